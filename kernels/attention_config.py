"""How `tree_attention` is cut into tiles and splits: a small table, a function of static things only.

Nothing here depends on what is in the batch: a row's arithmetic follows from the head size, the dtype,
the query heads of a KV head, the template's R and the engine's longest sequence. That is what makes a
result independent of the company it is computed in, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

# Splits are the unit of work along the context. Short ones fill the machine at few requests; long ones
# save partial results: at R = 16 and four query heads a KV head, writing and reading those of 512 slots
# moves a quarter of the bytes of their bf16 keys and values.
MIN_SPLIT = 512
MAX_SPLITS = 32
ANY_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of one launch.

    Attributes:
        block_m: packed query rows (row x query head of the group) of a tile.
        block_n: KV slots of a tile.
        split: KV slots of a split, a multiple of block_n; split i covers slots i * split to (i + 1) * split.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls, head_size: int, dtype: torch.dtype, group: int, num_rows: int, max_seq_len: int
    ) -> AttentionConfig:
        """The tiles for an engine.

        Args:
            head_size: D.
            dtype: of queries.
            group: query heads of a KV head.
            num_rows: R of the template.
            max_seq_len: longest sequence the engine takes (max_model_len), in tokens.
        """
        padded_size = triton.next_power_of_2(head_size)
        packed = triton.next_power_of_2(num_rows * group)
        # The largest tiles that hold everything in registers, on all targets (`python -m bita_kernels.aot`).
        if dtype == torch.float32:  # no tensor cores
            block_m, block_n, stages = 16, 32 if padded_size == 128 else 16, 2
            warps = 4 if padded_size == 128 else 8
        else:
            least, most = (16 if padded_size <= 64 else 32), (64 if padded_size <= 128 else 32)
            block_m, block_n, stages = min(max(packed, least), most), 32, 3
            warps = 4 if padded_size <= 64 and block_m < 64 else 8
        split = max(MIN_SPLIT, triton.next_power_of_2(triton.cdiv(max_seq_len, MAX_SPLITS)))
        return cls(block_m, block_n, split, warps, stages)

    def num_splits(self, max_seq_len: int) -> int:
        """Splits of the longest sequence."""
        return triton.cdiv(max_seq_len, self.split)

    def constants(
        self,
        *,
        num_kv_heads: int,
        group: int,
        num_rows: int,
        num_prompt: int,
        head_size: int,
        block_size: int,
        window: int,
        parallel: bool,
        min_queries: int,
        max_queries: int,
    ) -> dict[str, int]:
        """Compile-time constants of `tree_attention_kernel`; block_size is the KV cache's."""
        return {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "NUM_ROWS": num_rows,
            "NUM_WORDS": triton.cdiv(num_rows, 32),
            "NUM_PROMPT": num_prompt,
            "BLOCK_PROMPT": max(16, triton.next_power_of_2(num_prompt)),
            "HEAD_SIZE": head_size,
            "BLOCK_D": triton.next_power_of_2(head_size),
            "BLOCK_SIZE": block_size,
            "WINDOW": window,
            "PARALLEL": parallel,
            "MIN_QUERIES": min_queries,
            "MAX_QUERIES": max_queries,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "SPLIT": self.split,
        }
