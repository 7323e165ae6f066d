"""Which rows of a step are mask rows, for the layers that add the adapter's deltas to these only."""

from __future__ import annotations

import numpy as np
import torch


class MaskRows:
    """Which rows of a step are mask rows, in buffers that compiled and captured graphs read.

    Attributes:
        rows: `[capacity]` int64, the mask rows in front.
        num: `[1]` int64, how many they are.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.num = torch.zeros(1, dtype=torch.int64, device=device)

    def set(
        self,
        # [mask rows of the step]
        rows: np.ndarray,
    ) -> None:
        """The rows of this step, from the host."""
        self.rows[: len(rows)] = torch.from_numpy(rows)
        self.num.fill_(len(rows))

    def buffers(self) -> dict[str, torch.Tensor]:
        """What a layer's operation reads of a step, in the order of its arguments, and the layer's names of it."""
        return {"mask_rows": self.rows, "num_mask_rows": self.num}
