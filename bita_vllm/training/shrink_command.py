"""`bita shrink`: an adapter's low-rank deltas cut to a smaller rank, for less memory and cheaper mask rows.

Training at a high rank and cutting afterwards keeps most of what the high rank learnt: the product B A is replaced
by its best approximation of the smaller rank (its largest singular values).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from bita_vllm.adapter.deltas import MaskLoraWeights


def add_parser(subparsers: Any) -> None:
    """Add `shrink` to the `bita` command."""
    parser = subparsers.add_parser(
        "shrink",
        help="cut an adapter's low-rank deltas to a smaller rank",
        description="Write a copy of an adapter whose low-rank deltas have a smaller rank: the best approximation of "
        "the trained ones. Run 'bita eval' on both to see what it costs. Acceptance statistics are not copied.",
    )
    parser.add_argument("adapter", help="adapter directory or hub name, with deltas")
    parser.add_argument("--rank", type=int, required=True, help="of the deltas in the copy")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the copy; must not exist"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the copy; returns the exit code. Raises AdapterError."""
    from bita_vllm.adapter.checkpoint import Adapter, resolve_adapter_dir, save_adapter
    from bita_vllm.adapter.config import AdapterError

    adapter = Adapter.load(resolve_adapter_dir(args.adapter))
    if adapter.mask_lora is None:
        raise AdapterError(f"{args.adapter} has no low-rank deltas; there is nothing to cut.")
    if not 1 <= args.rank < adapter.mask_lora.rank:
        raise AdapterError(
            f"--rank is {args.rank}; expected 1 to {adapter.mask_lora.rank - 1}, less than the adapter's own."
        )
    if args.out.exists():
        raise AdapterError(f"{args.out} exists already; give a new directory as --out.")
    smaller, kept = shrink(adapter.mask_lora, args.rank)
    raw = {key: value for key, value in adapter.config.raw.items() if key != "acceptance"}
    if "training" in raw:
        raw["training"] = {**raw["training"], "shrunk_to_rank": args.rank}
    config = replace(adapter.config, raw=raw, acceptance=None)
    save_adapter(args.out, replace(adapter, config=config, mask_lora=smaller))
    print(
        f"{args.out}: rank {adapter.mask_lora.rank} cut to {args.rank}, {100 * kept:.1f}% of the deltas' energy kept"
    )
    return 0


def shrink(weights: MaskLoraWeights, rank: int) -> tuple[MaskLoraWeights, float]:
    """Deltas of that rank, and the share of the squared singular values that they keep."""
    modules, kept, total = {}, 0.0, 0.0
    for name, pair in weights.modules.items():
        modules[name], singular = _best_of_rank(*pair, weights.alpha / weights.rank, rank)
        kept += float((singular[:rank] ** 2).sum())
        total += float((singular**2).sum())
    return replace(weights, rank=rank, alpha=float(rank), modules=modules), kept / max(
        total, 1e-300
    )


def _best_of_rank(
    # [r, in]
    a: torch.Tensor,
    # [out, r]
    b: torch.Tensor,
    scale: float,
    rank: int,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A `[rank, in]` and B `[out, rank]` of the scaled product's best approximation; all its singular values `[r]`.

    By QR of both factors: the product itself, `[out, in]`, is never made.
    """
    import torch

    q_out, r_out = torch.linalg.qr(b.double() * scale)
    q_in, r_in = torch.linalg.qr(a.double().T)
    u, singular, v = torch.linalg.svd(r_out @ r_in.T)
    root = singular[:rank].sqrt()
    small_a = root[:, None] * (v[:rank] @ q_in.T)
    small_b = (q_out @ u[:, :rank]) * root
    return (small_a.to(a.dtype), small_b.to(b.dtype)), singular
