"""The drafts of the next blocks on their way from a runner to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.outputs import DraftTokenIds


@dataclass
class BlockDrafts(DraftTokenIds):
    """vLLM's drafts by request, and which block they fill: a grammar follows the paths of its tree.

    Attributes:
        lines: line of the template table, for each of `req_ids`.
    """

    lines: list[int]
