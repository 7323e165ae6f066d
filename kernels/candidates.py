"""What a source of drafts gives, and what a block is built and its tree chosen from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """The candidates for the next blocks of B requests, by depth and rank.

    The number of depths is the source's own: a source may reach further than masks do, or less far. Two sources in
    one block are padded to one depth, with chance 0, and lie side by side in ranks.

    Attributes:
        tokens: `[B, depths, ranks]` int64, tokens that may stand at depth d+1.
        chance: `[B, depths, ranks]` fp32, P(the target takes the token, if it has taken the top one above); read only
            where trees are chosen.
        depths: `[B]` integers, depths that have candidates. After those anything may stand in `tokens` and `chance`.
    """

    tokens: torch.Tensor
    chance: torch.Tensor
    depths: torch.Tensor

    @classmethod
    def empty(
        cls, num_requests: int, num_depths: int, num_ranks: int, device: torch.device | str
    ) -> Candidates:
        """Allocate them for a device, without any candidates."""
        shape = num_requests, num_depths, num_ranks
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(num_requests, dtype=torch.int32, device=device),
        )

    def of(self, requests: slice) -> Candidates:
        """Those of some requests, as views."""
        return Candidates(self.tokens[requests], self.chance[requests], self.depths[requests])

    def within(self, num_depths: int, ranks: slice) -> Candidates:
        """Those of the first depths and of some ranks, as views."""
        tokens, chance = (each[:, :num_depths, ranks] for each in (self.tokens, self.chance))
        return Candidates(tokens, chance, self.depths)

    def none(self) -> Candidates:
        """No candidates, of no depth, for the same requests: the host knows that none has any."""
        return Candidates(self.tokens[:, :0], self.chance[:, :0], self.depths)
