"""Files that are written whole or not at all, for all that bita writes and others may read at the same time."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield the name of a new file in the same folder, which takes the place of `path` when the block ends.

    A reader sees the old file or the new one, a crash leaves the old one, and writers at the same time do not mix:
    each has a name of its own. Where the block or the disk fails, nothing of the new file stays. Raises OSError.
    """
    path = Path(path)
    scratch = path.with_name(f".saving-{uuid4().hex[:12]}-{path.name}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(
                file.fileno()
            )  # else a machine that fails may keep the new name without the content
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write the file whole, in UTF-8. Raises OSError."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write the file whole. Raises OSError."""
    with written_whole(path) as scratch:
        scratch.write_bytes(content)


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the file whole: a header with the keys of the first row, then the rows. Raises OSError."""
    with written_whole(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
