"""Ratios that survive a shared machine: every contestant is timed in turn, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from vlmrb_torchrl.checks import require


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, one a round, in the order of the rounds."""

    samples: Sequence[float]

    @property
    def median(self) -> float:
        """The middle measurement."""
        return statistics.median(self.samples)

    def durations(self, units_per_s: float) -> Spread:
        """Times of one piece of work, where the samples are pieces a second.

        Args:
            units_per_s: Of the time's unit: 1e3 for milliseconds.
        """
        return Spread([units_per_s / sample for sample in self.samples])

    def __truediv__(self, other: Spread) -> Spread:
        """Ratios round by round: what slowed both down in a round cancels."""
        return Spread([a / b for a, b in zip(self.samples, other.samples, strict=True)])

    def __str__(self) -> str:
        """Median, and the lowest and highest measurement."""
        low, middle, high = map(_short, (min(self.samples), self.median, max(self.samples)))
        return f"{middle} ({low} to {high})"


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def rates(
    contestants: Mapping[str, Callable[[], int]], rounds: int, seconds: float
) -> dict[str, Spread]:
    """Time contestants in turn.

    Args:
        contestants: Each does some of its work and returns how many units it did.
        rounds: Measurements of each, after one that is not counted.
        seconds: Least duration of a measurement; 0: each contestant works once.

    Returns:
        Units per second of each contestant, one sample a round.
    """
    require(rounds >= 1, "rounds", rounds, "use at least 1")
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, work in contestants.items():
            units, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or not units:
                units += work()
            if i:  # the first round warms caches up
                samples[name].append(units / elapsed)
    return {name: Spread(values) for name, values in samples.items()}


def against_first(speeds: Mapping[str, Spread]) -> list[tuple[str, Spread, Spread]]:
    """Rows of a table: each contestant, its speed, and that over the first contestant's."""
    first = next(iter(speeds.values()))
    return [(name, speed, speed / first) for name, speed in speeds.items()]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of names and figures."""
    spreads = any(isinstance(cell, Spread) for row in rows for cell in row)
    table = Table(title=f"{title}; median (lowest to highest)" if spreads else title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
