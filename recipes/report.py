"""Tables and curves of a comparison, with 95 % bootstrap intervals over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from recipes.metrics import read_rows

Array = NDArray[np.float64]

RESAMPLES = 10_000
SUCCESS_LEVEL = 0.8
BASELINES = ("uer", "per")


@dataclass
class Outcome:
    """What the runs of a method reached; one entry, or row, per seed.

    Args:
        env_steps: ``[P]`` environment steps at the P evaluations.
        success: ``[S, P]`` success rate at each evaluation of each of S seeds.
        speed: ``[S]`` environment steps per second of training, evaluations left out.
    """

    env_steps: Array
    success: Array
    speed: Array

    @property
    def final(self) -> Array:
        """Success rate at the last evaluation, ``[S]``."""
        return self.success[:, -1]

    @property
    def area(self) -> Array:
        """Area under the curve: mean success over the evaluations, ``[S]``."""
        area: Array = self.success.mean(axis=1)
        return area

    @property
    def steps_to_level(self) -> Array:
        """Env steps to the first evaluation at ``SUCCESS_LEVEL``, ``[S]``; inf if never."""
        reached = self.success >= SUCCESS_LEVEL
        steps = self.env_steps[reached.argmax(axis=1)]
        return np.where(reached.any(axis=1), steps, np.inf)


def interval(values: Array) -> tuple[float, float, float]:
    """Mean and 95 % percentile-bootstrap interval of the mean.

    Args:
        values: One number per seed, ``[S]``; a single seed has no interval (NaN).
    """
    if len(values) < 2 or np.ptp(values) == 0:
        bound = float("nan") if len(values) < 2 else float(values[0])
        return float(values.mean()), bound, bound
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(values.mean()), float(result.low), float(result.high)


def read_outcome(folders: list[Path]) -> Outcome:
    """Read the metrics of one method's runs."""
    curves, speeds, env_steps = [], [], []
    for folder in folders:
        rows = read_rows(folder)
        evaluations = [row for row in rows if "eval/success" in row]
        curves.append([row["eval/success"] for row in evaluations])
        env_steps = [row["env_steps"] for row in evaluations]
        speeds.append(rows[-1]["env_steps"] / rows[-1]["seconds"])
    return Outcome(np.array(env_steps, float), np.array(curves, float), np.array(speeds))


def cell(values: Array, digits: int = 2) -> str:
    """Write a mean with its interval."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def steps_cell(outcome: Outcome) -> str:
    """Write the median of the steps to the level, and how many seeds reached it."""
    steps = outcome.steps_to_level
    median = np.median(steps)
    shown = f"> {outcome.env_steps[-1] / 1e3:.0f}k" if np.isinf(median) else f"{median / 1e3:.0f}k"
    return f"{shown} ({np.isfinite(steps).sum()}/{len(steps)})"


def table_rows(outcomes: dict[str, Outcome]) -> list[list[str]]:
    """Build the table: a row per method, differences paired by seed."""
    header = ["method", "seeds", "final success", "area under curve"]
    header += [f"steps to {SUCCESS_LEVEL:.0%} (median, reached)", "env steps/s"]
    baselines = [name for name in BASELINES if name in outcomes]
    rows = [header + [f"area minus {name}" for name in baselines]]
    for method, outcome in outcomes.items():
        row = [method, str(len(outcome.final)), cell(outcome.final), cell(outcome.area)]
        row += [steps_cell(outcome), cell(outcome.speed, 0)]
        for name in baselines:
            same = name == method
            row.append("" if same else cell(outcome.area - outcomes[name].area))
        rows.append(row)
    return rows


def draw_curves(outcomes: dict[str, Outcome], path: Path) -> None:
    """Draw success over environment steps: mean and 95 % interval over seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, outcome in outcomes.items():
        bounds = np.array([interval(column) for column in outcome.success.T])
        (line,) = axes.plot(outcome.env_steps, bounds[:, 0], label=method)
        axes.fill_between(
            outcome.env_steps, bounds[:, 1], bounds[:, 2], color=line.get_color(), alpha=0.2
        )
    axes.set(
        xlabel="environment steps", ylabel="success rate on held-out seeds", ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=140)


def report(folders: dict[str, list[Path]], out: Path, console: Console) -> None:
    """Print the table, write ``table.md`` and ``curves.png``, say where the logs lie.

    Args:
        folders: Run folders of each method, in the same order of seeds.
        out: Folder to write to.
        console: Where to print.
    """
    outcomes = {method: read_outcome(paths) for method, paths in folders.items()}
    header, *rows = table_rows(outcomes)
    table = Table(*header, title="95 % bootstrap intervals over seeds")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        table.add_row(*row)
        lines.append("| " + " | ".join(row) + " |")
    console.print(table)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw_curves(outcomes, out / "curves.png")
    console.print(f"curves: {out / 'curves.png'}   logs: tensorboard --logdir {out}")
