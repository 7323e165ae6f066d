"""How many rows get logits at once, within the memory that vLLM keeps for them and the time that a pass takes."""

from __future__ import annotations

from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from bita_vllm.system.machine import DeviceSpeed

# Slices of int32 buffers that begin at a multiple of it are aligned to 16 bytes: Triton compiles for others anew.
ALIGNED_REQUESTS = 4

# Rows of one pass of the output head over nodes and all mask rows that may be chosen, over the knee's. Up to the knee
# a pass takes as long as reading the weights, and two passes read them twice, so one pass over a few rows more is
# still shorter, also where its last tile of 128 rows is nearly empty. If the knee is not known: two tiles of 64 rows.
KNEES_IN_ONE_PASS = 1.25
MAX_ROWS_IN_ONE_PASS = 128


def rows_in_one_pass(num_ranks: int, vocab_size: int, speed: DeviceSpeed | None = None) -> int:
    """Most rows that get logits at once for nodes and mask rows together; else mask rows have a pass of their own.

    A tensor-parallel rank reads its share of the weights only, but gathers all logits, so fewer rows pay.
    """
    most = MAX_ROWS_IN_ONE_PASS if speed is None else int(KNEES_IN_ONE_PASS * speed.knee)
    return min(most // num_ranks, get_max_chunk_logits(vocab_size))


def parts_of(num_requests: int, rows_each: int, vocab_size: int) -> list[slice]:
    """Runs of requests whose logits are held at once: as many as vLLM's rejection sampler holds."""
    most = max(1, get_max_chunk_logits(vocab_size) // rows_each)
    if most > ALIGNED_REQUESTS:
        most -= most % ALIGNED_REQUESTS
    return [slice(start, min(start + most, num_requests)) for start in range(0, num_requests, most)]
