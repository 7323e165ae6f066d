"""What copies cost a step on a GPU, predicted: the launches of `find_copies`, from bytes, waves and loads that wait.

No GPU is needed, and none was used. `on_host`: vLLM's V2 runner keeps texts in the host's memory unless it is asked
otherwise (`use_dense_all_token_ids`); every step then reads them over PCIe.
"""

import argparse
import math
from pathlib import Path

from attention_model import EMPTY_PROGRAM, LOAD, MAX_SEQ_LEN, TILE_CHAIN, Device
from bita_kernels.find_copies import BLOCK, MAX_SPLITS
from cpu_throughput import RESULTS, rounded, write_csv
from provenance import provenance
from step_model import DEVICES, LAUNCH

TOKEN = 4  # bytes of an int32 token
PROGRAMS = 8  # of `_scan`, resident on an SM: kernels_aot.csv
# Loads of a program of `_scan` that wait for each other: slot, tokens of the text, its last token and a block.
SCAN_LOADS = 3
# Comparisons of a block, one token back each: most blocks have no match longer than two (an assumption).
COMPARISONS = 3
# Of a program of `_copy`: slot, what is known of it, the last copy and what the text took; keys; the new copy.
COPY_LOADS = 5
PCIE_BYTES = 50e9  # a second, of a PCIe 5.0 x16 link in large reads (an assumption)


def seconds(
    device: Device, requests: int, context: int, on_host: bool, max_model_len: int = MAX_SEQ_LEN
) -> float:
    """Both launches, one after the other."""
    splits = min(MAX_SPLITS, math.ceil(max_model_len / BLOCK))
    blocks = math.ceil(context / BLOCK)
    at_once = device.sms * PROGRAMS
    busy = requests * min(splits, blocks)
    waves = math.ceil(busy / at_once)
    block = LOAD + COMPARISONS * TILE_CHAIN
    longest = SCAN_LOADS * LOAD + math.ceil(blocks / splits) * block
    empty = EMPTY_PROGRAM * math.floor((requests * splits - busy) / at_once)
    read = requests * context * TOKEN
    moving = read / (PCIE_BYTES if on_host else device.speed.bytes_per_second)
    scan = LAUNCH + empty + max(waves * longest, SCAN_LOADS * LOAD + moving)
    return scan + LAUNCH + COPY_LOADS * LOAD


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--context", nargs="+", type=int, default=[8192, 131072])
    parser.add_argument("--out", type=Path, default=RESULTS / "copies_model.csv", help="CSV")
    args = parser.parse_args()
    facts, rows = provenance(), []
    for device in DEVICES.values():
        for context in args.context:
            for requests in args.requests:
                found = {
                    "predicted_for": device.name,
                    "context": context,
                    "requests": requests,
                    "device_us": 1e6 * seconds(device, requests, context, on_host=False),
                    "host_us": 1e6 * seconds(device, requests, context, on_host=True),
                }
                print(rounded(found))
                rows.append(rounded({**found, **facts}))
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
