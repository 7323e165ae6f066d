"""What a part of the suite runs on: time, folder, rows that are on the disk when they are measured."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Machine:
    """One run of a part.

    Attributes:
        out: folder of everything that is kept: CSVs, tables, one log.
        scratch: folder of models and adapters, not kept.
        model, adapter: of the embedded model.
        limit: seconds that the part may take; what does not fit is left out, and named.
        dry: on a CPU, interpreted, engines one after the other in this process.
        facts: columns that every row gets: where its numbers come from.
        plain_options: options of plain vLLM's engines alone.
        failed: what did not run to its end, for the exit code.
    """

    part: str
    out: Path
    scratch: Path
    model: Path | None
    adapter: Path
    limit: float
    dry: bool
    facts: Row
    plain_options: Row = field(default_factory=dict)
    ladder: Path | None = None
    failed: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        """What engines and subprocesses say."""
        return self.out / f"{self.part}.log"

    def remaining(self) -> float:
        """Seconds left."""
        return self.limit - (time.monotonic() - self.begun)

    def say(self, text: str) -> None:
        """Print it, and keep it in the part's text file."""
        print(text, flush=True)
        with (self.out / f"{self.part}.txt").open("a") as file:
            file.write(text + "\n")

    def fail(self, what: str, why: str) -> None:
        """Say what did not run; the part goes on."""
        self.failed.append(what)
        self.say(f"{what}: {why}")


@dataclass(frozen=True)
class Item:
    """A piece of a part: what runs, how many engines start, how long it is expected to take on an H100."""

    name: str
    starts: int
    seconds: int
    run: Callable[[Machine], None]


class RowFile:
    """A CSV whose rows are on the disk when they have been added."""

    def __init__(self, path: Path, columns: Sequence[str], facts: Row) -> None:
        self.rows: list[Row] = []
        self._columns, self._facts = list(columns), facts
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, fieldnames=[*columns, *facts])
        self._writer.writeheader()
        self._file.flush()

    def add(self, row: Row) -> None:
        """Write a row; columns that it lacks stay empty."""
        full = {name: row.get(name, "") for name in self._columns}
        if unknown := row.keys() - full.keys():
            raise ValueError(f"no column for {', '.join(sorted(unknown))}")
        self.rows.append(full)
        self._writer.writerow({**full, **self._facts})
        self._file.flush()

    def close(self) -> None:
        """Every row has been added."""
        self._file.close()


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows for the terminal, right-aligned."""
    cells = [list(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
