"""What a run looked like: one CSV row a step, and the same as a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from bita_vllm.system.atomic_write import write_csv, written_whole
from bita_vllm.training.loss import LossResult

RECENT_STEPS = 50


class Curve:
    """`training.csv` and `training.png` of a run in the directory `out`."""

    def __init__(self, out: Path, num_masks: int) -> None:
        self._out, self._num_masks = out, num_masks
        self.rows: list[dict[str, float]] = []

    def add(
        self,
        *,
        step: int,
        loss: float,
        result: LossResult,
        grad_norm: float,
        lr: float,
        seconds: float,
        sequences: int,
    ) -> dict[str, float]:
        """Append one step; returns the row."""
        count = result.count.clamp(min=1)
        row: dict[str, float] = {
            "step": step,
            "loss": loss,
            "cross_entropy": float(result.cross_entropy.sum() / count.sum()),
            "divergence": float(result.divergence.sum() / count.sum()),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds": seconds,
            "sequences": sequences,
            "mask_rows": float(result.count.sum()),
        }
        for place, accuracy in enumerate((result.correct / count).tolist(), start=1):
            row[f"m{place}_accuracy"] = accuracy
        self.rows.append(row)
        return row

    def cut(self, step: int) -> None:
        """Read the rows of an earlier run up to `step`."""
        path = self._out / "training.csv"
        if path.exists():
            with path.open(newline="") as file:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["step"] <= step]

    def mean(self, name: str) -> float:
        """Mean over the last steps."""
        recent = self.rows[-RECENT_STEPS:]
        return sum(row[name] for row in recent) / len(recent)

    def summary(self) -> dict[str, float]:
        """Means over the last steps, and rates."""
        if not self.rows:
            return {}
        names = ["loss", "cross_entropy", "divergence", *self._accuracies()]
        return {
            **{name: round(self.mean(name), 4) for name in names},
            "mask_rows_per_second": round(self.mean("mask_rows") / self.mean("seconds"), 2),
            "sequences_per_second": round(self.mean("sequences") / self.mean("seconds"), 3),
        }

    def recent(self, row: dict[str, float]) -> dict[str, Any]:
        """For the progress bar."""
        accuracy = "/".join(f"{self.mean(name):.3f}" for name in self._accuracies())
        return {
            "loss": f"{self.mean('loss'):.3f}",
            "accuracy": accuracy,
            "masks/s": f"{row['mask_rows'] / row['seconds']:.0f}",
        }

    def write(self) -> None:
        """Write training.csv, whole. Raises OSError."""
        if self.rows:
            write_csv(self._out / "training.csv", self.rows)

    def plot(self) -> None:
        """Write training.png, whole: loss, and accuracy of each mask. Raises OSError."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = [row["step"] for row in self.rows]
        for name in ("loss", "cross_entropy", "divergence"):
            left.plot(steps, self._smooth(name), label=name)
        for name in self._accuracies():
            right.plot(steps, self._smooth(name), label=name)
        for axes, label in ((left, "nats"), (right, "top-1 accuracy")):
            axes.set(xlabel="step", ylabel=f"{label} (mean of {RECENT_STEPS} steps)")
            axes.legend()
            axes.grid(alpha=0.3)
        with written_whole(self._out / "training.png") as scratch:
            figure.savefig(scratch, dpi=120)

    def _accuracies(self) -> list[str]:
        return [f"m{place}_accuracy" for place in range(1, self._num_masks + 1)]

    def _smooth(self, name: str) -> list[float]:
        values = [row[name] for row in self.rows]
        windows = [values[max(0, i + 1 - RECENT_STEPS) : i + 1] for i in range(len(values))]
        return [sum(window) / len(window) for window in windows]
