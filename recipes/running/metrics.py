"""The metrics file of a run: one JSON object per row, readable while it is written."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
"""Folder beside it."""

Row = dict[str, float]


def read_rows(folder: Path) -> list[Row]:
    """Read every whole row of a run's metrics; empty if it has written none yet."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    with path.open() as file:
        return [row for line in file if (row := _parse(line))]


def last_row(folder: Path) -> Row:
    """Read the last whole row of a run's metrics; empty if it has written none yet."""
    path = folder / METRICS_FILE
    if not path.exists():
        return {}
    with path.open() as file:
        tail = deque(file, maxlen=1)
    return _parse(tail[0]) if tail else {}


def _parse(line: str) -> Row:
    try:
        row: Row = json.loads(line)
    except json.JSONDecodeError:  # the writer is in the middle of this line
        return {}
    return row
