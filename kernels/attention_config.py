"""How `tree_attention` is cut into tiles and splits: a small table, a function of static things only.

Nothing here depends on what is in the batch: a row's arithmetic follows from the head size, the dtype,
the heads, the template's R and the device. That is what makes a result independent of the company it is
computed in, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

MIN_SPLIT = 128
# Programs of one request that fill a large GPU (80 to 150 SMs).
PROGRAMS = 128
# Query heads that one program of `combine_splits_kernel` merges.
COMBINE_HEADS = 4
# The first compute capability with programmatic dependent launch: one may begin while that in front of it runs.
EARLY_SM = 90


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles and splits of a launch.

    The context's first 2 * per_doubling splits have `split` slots; from there on every doubling of the
    context adds `per_doubling` splits, each twice as long as those before. So a request has enough splits
    to fill a GPU at any length of context, and few partial results at a great one.

    Attributes:
        block_m: packed query rows (row x query head of the group) of a tile.
        block_n: KV slots of a tile.
        split: KV slots of the shortest splits, a multiple of block_n.
        per_doubling: splits that a doubling of the context adds.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int
    block_n: int
    split: int
    per_doubling: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls,
        head_size: int,
        dtype: torch.dtype,
        group: int,
        num_rows: int,
        *,
        num_kv_heads: int,
    ) -> AttentionConfig:
        """The tiles for an engine.

        Args:
            head_size: D.
            dtype: of queries.
            group: query heads of a KV head.
            num_rows: R of the template.
            num_kv_heads: Hkv of this rank.
        """
        # What `python -m bita_kernels.aot` shows for all targets: nothing spills (128 rows would, with
        # splits in turn), shared memory stays below 99 KiB (sm_89, sm_120), and two or three tiles of
        # keys and values are on their way while one is worked on. Triton spreads the stages over two
        # loads, as a page's number comes before its keys: 7 stages are 3 or 4 buffers.
        wide = head_size > 128
        if dtype == torch.float32:  # no tensor cores
            block_m, block_n, warps = 16, 16, 8 if wide else 4
            stages = 3 if head_size <= 64 else 2  # with 2, 8 bytes spill on sm_89 and sm_120
        else:
            packed = triton.next_power_of_2(num_rows * group)
            block_m = min(max(packed, 16), 32 if wide else 64)
            block_n, stages = 16 if wide else 32, 7
            warps = 4 if block_m <= 32 and head_size <= 192 else 8
        tiles = triton.cdiv(num_rows * group, block_m)
        splits = triton.next_power_of_2(triton.cdiv(PROGRAMS, num_kv_heads * tiles))
        per_doubling = min(max(splits // 2, 2), 32)
        # Two tiles are twice the programs: splits twice as long leave half the partial results, and no SM idle.
        split = MIN_SPLIT * min(tiles, 2)
        return cls(block_m, block_n, split, per_doubling, warps, stages)

    def num_splits(self, num_slots: int) -> int:
        """Splits that hold the first `num_slots` slots of a context."""
        length, longer = self.split, 0
        while 2 * self.per_doubling * length < num_slots:
            length, longer = 2 * length, longer + self.per_doubling
        return longer + triton.cdiv(num_slots, length)

    def num_parts(self, max_seq_len: int) -> int:
        """Partial results of the longest sequence: its splits, and one for what is not context."""
        return 1 + self.num_splits(max_seq_len)

    def num_programs(self, tiles: int, wanted: int, max_seq_len: int) -> int:
        """Programs of each of a launch's `tiles`: one for what is not context, the others stride over the splits.

        Args:
            tiles: of all requests and KV heads.
            wanted: programs that fill the machine.
            max_seq_len: slots of the longest sequence.
        """
        return 1 + min(max(triton.cdiv(wanted, tiles), 1), self.num_splits(max_seq_len))

    def short_in_turn(self, head_size: int) -> bool:
        """Whether the kernel for splits side by side also takes short contexts in turn: where both fit in registers.

        Elsewhere it would spill: heads of 192, and tiles of 16 rows on sm_89.
        """
        wide = triton.next_power_of_2(head_size)
        return wide < 128 or (wide == 128 and self.block_m > 16)

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
    ) -> dict[str, int]:
        """Compile-time constants of `tree_attention_kernel`; block_size is the KV cache's."""
        return {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "NUM_ROWS": num_rows,
            "NUM_WORDS": triton.cdiv(num_rows, 32),
            "NUM_PROMPT": num_prompt,
            "HEAD_SIZE": head_size,
            "BLOCK_D": triton.next_power_of_2(head_size),
            "BLOCK_SIZE": block_size,
            "WINDOW": window,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "SPLIT": self.split,
            "PER_DOUBLING": self.per_doubling,
            "SHORT_IN_TURN": self.short_in_turn(head_size),
        }

    def combine_constants(
        self, *, num_q_heads: int, num_rows: int, head_size: int, window: int
    ) -> dict[str, int]:
        """Compile-time constants of `combine_splits_kernel`."""
        return {
            "NUM_HEADS": num_q_heads,
            "BLOCK_HEADS": COMBINE_HEADS,
            "NUM_ROWS": num_rows,
            "HEAD_SIZE": head_size,
            "BLOCK_D": triton.next_power_of_2(head_size),
            "WINDOW": window,
            "BLOCK_N": self.block_n,
            "SPLIT": self.split,
            "PER_DOUBLING": self.per_doubling,
        }
