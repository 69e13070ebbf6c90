"""Tables and figures of a study, with 95 % bootstrap intervals over seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import rich.table
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console

from recipes.running.results import Rows, crossed
from recipes.running.statistics import (
    Array,
    interquartile_mean,
    interval,
    mean,
    median,
    probability_of_improvement,
    profile,
)
from vlmrb_torchrl.checks import require, shown

SUCCESS_LEVEL = 0.8
BASELINES = ("uer", "per", "per_unweighted", "per_alpha_1", "per_computed")
EPISODES = (
    "The episodes of an evaluation depend on its number alone: all methods and seeds play the "
    "same ones, and how other episodes would have gone is not in the intervals."
)


@dataclass
class Outcome:
    """What the runs of a method on a task reached; one entry, or row, per seed.

    Args:
        seeds: The S seeds.
        env_steps: ``[P]`` environment steps at the P evaluations.
        curves: ``[S, P]`` success rate, or return, at each evaluation of each seed.
        speed: ``[S]`` environment steps per second of training, evaluations left out.
        measure: What ``curves`` holds, ``"success"`` or ``"return"``.
    """

    seeds: list[int]
    env_steps: Array
    curves: Array
    speed: Array
    measure: str = "success"

    @property
    def final(self) -> Array:
        """The last evaluation, ``[S]``."""
        return self.curves[:, -1]

    @property
    def area(self) -> Array:
        """Area under the curve: mean over the evaluations, ``[S]``."""
        area: Array = self.curves.mean(axis=1)
        return area

    @property
    def steps_to_level(self) -> Array:
        """Env steps to the first evaluation at ``SUCCESS_LEVEL``, ``[S]``; inf if never."""
        reached = self.curves >= SUCCESS_LEVEL
        steps = self.env_steps[reached.argmax(axis=1)]
        return np.where(reached.any(axis=1), steps, np.inf)


Outcomes = dict[str, list[Outcome]]
"""By the method's name, what it reached on each of some tasks."""
Panels = dict[tuple[str, str, str], dict[str, Outcome]]
"""By task, algorithm and variant, what each method reached there."""
Table = list[list[str]]
"""Cells, the header first."""


def panels_of(results: Rows) -> Panels:
    """Sort the rows of ``results.csv`` by what they are compared with."""
    sorted_: dict[tuple[str, str, str], dict[str, Rows]] = {}
    for row in results:
        method = row["method"] + (f" ({row['judge']})" if row["judge"] else "")
        panel = sorted_.setdefault((row["task"], row["algorithm"], row["variant"]), {})
        panel.setdefault(method, []).append(row)
    return {
        panel: {method: outcome_of(rows) for method, rows in methods.items()}
        for panel, methods in sorted_.items()
    }


def outcome_of(rows: Rows) -> Outcome:
    """Take the evaluations of one method's runs; a task without success is told by its return."""
    runs: dict[int, Rows] = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append(row)
    measure = "return" if any(row["success"] == "" for row in rows) else "success"
    axes = [[row["env_steps"] for row in evaluations] for evaluations in runs.values()]
    for seed, axis in zip(runs, axes, strict=True):
        require(
            axis == axes[0],
            f"the env steps at the evaluations of {rows[0]['method']}, seed {seed},",
            axis,
            f"compare it with runs evaluated at the same; the first was at {shown(axes[0])}",
        )
    last = [evaluations[-1] for evaluations in runs.values()]
    return Outcome(
        list(runs),
        np.array(axes[0], float),
        np.array([[row[measure] for row in evaluations] for evaluations in runs.values()], float),
        np.array([row["env_steps"] / row["seconds"] for row in last]),
        measure,
    )


def paired(outcomes: list[Outcome], baselines: list[Outcome]) -> list[Array]:
    """Differences in area on each task, of the seeds that both have.

    Areas over other evaluations are not held against each other.
    """
    differences = []
    for outcome, baseline in zip(outcomes, baselines, strict=True):
        if not np.array_equal(outcome.env_steps, baseline.env_steps):
            return []
        _, own, other = np.intersect1d(outcome.seeds, baseline.seeds, return_indices=True)
        differences.append(outcome.area[own] - baseline.area[other])
    return differences if all(map(len, differences)) else []


# -------------------------------------------------------------- tables


def cell(strata: list[Array], statistic: Callable[..., Any] = mean, digits: int = 2) -> str:
    """Write a statistic with its interval."""
    centre, low, high = interval(strata, statistic)
    return f"{centre:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def steps_cell(outcome: Outcome) -> str:
    """Write the median of the steps to the level, its interval, and how many seeds reached it.

    A seed that never reached the level counts as one that needed more than the budget.
    """
    budget = outcome.env_steps[-1]
    steps = outcome.steps_to_level
    beyond = 2 * budget  # any number past the budget gives the same medians, read as "more"

    def shown(number: float) -> str:
        if np.isnan(number):
            return "nan"
        return f"> {budget / 1e3:.0f}k" if number > budget else f"{number / 1e3:.0f}k"

    centre, low, high = interval([np.where(np.isinf(steps), beyond, steps)], median)
    reached = np.isfinite(steps).sum()
    return f"{shown(centre)} ({reached}/{len(steps)}) [{shown(low)}, {shown(high)}]"


def outcome_table(outcomes: Outcomes) -> Table:
    """Build the table of outcomes: a row per method."""
    rows = []
    for method, tasks in outcomes.items():
        areas, measure = [outcome.area for outcome in tasks], tasks[0].measure
        row = {
            "method": method,
            "runs": str(sum(map(len, areas))),
            f"final {measure}": cell([outcome.final for outcome in tasks]),
            "area under curve": cell(areas),
            "its interquartile mean": cell(areas, interquartile_mean),
        }
        if len(tasks) == 1:
            if measure == "success":
                row["steps to 80 %"] = steps_cell(tasks[0])
            row["env steps/s"] = cell([tasks[0].speed], digits=0)
        rows.append(row)
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def against_table(
    outcomes: Outcomes, header: str, compared: Callable[[list[Outcome], list[Outcome]], str]
) -> Table:
    """Build the table of methods against those of the ``BASELINES`` that are there."""
    baselines = [name for name in BASELINES if name in outcomes]
    if not baselines or len(outcomes) < 2:
        return []
    rows = [["area under curve of", *(f"{header} {name}" for name in baselines)]]
    for method, tasks in outcomes.items():
        cells = ["" if name == method else compared(tasks, outcomes[name]) for name in baselines]
        rows.append([method, *cells])
    return rows


def difference(tasks: list[Outcome], baseline: list[Outcome]) -> str:
    """Write the mean difference in area, paired by seed."""
    differences = paired(tasks, baseline)
    return cell(differences) if differences else "not comparable"


def improvement(tasks: list[Outcome], baseline: list[Outcome]) -> str:
    """Write the probability that a run has the larger area."""
    if not paired(tasks, baseline):
        return "not comparable"
    areas = [outcome.area for outcome in (*tasks, *baseline)]
    return cell(areas, probability_of_improvement)


def show(table: Table, title: str, console: Console) -> str:
    """Print a table, an interval below its mean; return it as Markdown."""
    if not table:
        return ""
    header, *body = table
    printed = rich.table.Table(*header, title=title, title_justify="left")
    lines = [title, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in body:
        printed.add_row(*(text.replace(" [", "\n\\[") for text in row))
        lines.append("| " + " | ".join(row) + " |")
    console.print(printed)
    return "\n".join(lines) + "\n"


def groups_of(panels: Panels) -> dict[str, Outcomes]:
    """The methods of each panel and, where success is known on all of several tasks, over them."""
    groups = {title(panel): {m: [o] for m, o in found.items()} for panel, found in panels.items()}
    measures = {outcome.measure for found in panels.values() for outcome in found.values()}
    if len({task for task, *_ in panels}) > 1 and measures == {"success"}:  # returns have no scale
        for setting in dict.fromkeys(panel[1:] for panel in panels):
            tasks = [found for panel, found in panels.items() if panel[1:] == setting]
            methods = [m for m in tasks[0] if all(m in found for found in tasks)]
            over_all = {m: [found[m] for found in tasks] for m in methods}
            groups |= {title(("all tasks", *setting)): over_all} if methods else {}
    return groups


def title(panel: Iterable[str]) -> str:
    """Write which task, algorithm and variant is shown."""
    return ", ".join(filter(None, panel))


def write_tables(
    groups: dict[str, Outcomes], about: str, notes: list[str], path: Path, to: Console
) -> None:
    """Print the tables of each group, and write them as Markdown."""
    text = [f"{about}\n"] if about else []
    for name, outcomes in groups.items():
        said = f"{name}: mean (of steps: median) and 95 % bootstrap interval over seeds"
        text.append(show(outcome_table(outcomes), said, to))
        table = against_table(outcomes, "minus", difference)
        text.append(show(table, "Differences, paired by seed", to))
        table = against_table(outcomes, "above", improvement)
        text.append(show(table, "Probability that a run has the larger area", to))
    for note in [EPISODES, *notes]:
        to.print(note, soft_wrap=True, markup=False)
        text.append(f"{note}\n")
    path.write_text("\n".join(filter(None, text)))


# -------------------------------------------------------------- figures


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG."""
    figure.savefig(path.with_suffix(".png"), dpi=140)
    figure.set_layout_engine("none")  # it is laid out, which takes longest
    with mpl.rc_context({"svg.hashsalt": path.stem}):  # of the same figures the same file
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


class Drawing:
    """A grid of axes, in which each method has the same style as in every other.

    Args:
        methods: Names of all methods of the study.
        rows: Axes below each other.
        columns: Axes beside each other.
    """

    def __init__(self, methods: list[str], rows: int, columns: int) -> None:
        self._methods = methods
        width = max(4.0 * columns + 0.6, 7.0)
        self._legend_columns = int(width / 1.7)
        height = 3.1 * rows + 1.2 + 0.25 * math.ceil(len(methods) / self._legend_columns)
        self._figure = Figure(figsize=(width, height), layout="constrained")
        self.axes = self._figure.subplots(rows, columns, squeeze=False)
        for axes in self.axes.flat:
            axes.grid(alpha=0.3)

    def _style(self, method: str) -> dict[str, Any]:
        i = self._methods.index(method)
        dashed = "--" if method in BASELINES else "-"
        return {"color": f"C{i % 10}", "linestyle": dashed, "marker": "osD^vPX*<>"[i % 10]}

    def band(self, axes: Any, method: str, x: Any, bounds: Array, **style: Any) -> None:
        """A line with its interval, ``[3, P]``."""
        own = self._style(method)
        axes.plot(x, bounds[0], label=method, markersize=4, **{**own, **style})
        axes.fill_between(x, bounds[1], bounds[2], color=own["color"], alpha=0.15, linewidth=0)

    def points(self, axes: Any, bounds: dict[str, Array]) -> None:
        """A point with its interval, ``[3]``, of each method, the first one on top."""
        for method, (centre, low, high) in bounds.items():
            own, y = self._style(method), -self._methods.index(method)
            axes.plot([low, high], [y, y], color=own["color"], linewidth=2)
            axes.plot(centre, y, color=own["color"], marker=own["marker"])
        axes.set_yticks(range(0, -len(self._methods), -1), self._methods)
        axes.set_ylim(0.5 - len(self._methods), 0.5)

    def save(self, path: Path, caption: str) -> None:
        """Write it as PNG and SVG, with one legend."""
        found = [axes.get_legend_handles_labels() for axes in self._figure.axes]
        lines = {label: line for each in found for line, label in zip(*each, strict=True)}
        self._figure.legend(
            [lines[method] for method in self._methods if method in lines],
            [method for method in self._methods if method in lines],
            loc="outside lower center",
            ncols=self._legend_columns,
        )
        caption = textwrap.fill(caption, int(13 * self._figure.get_figwidth()))
        self._figure.suptitle(caption, fontsize="small")
        save(self._figure, path)


def draw_curves(panels: Panels, methods: list[str], about: str, path: Path) -> None:
    """Draw success over environment steps: a row per task and algorithm, a column per variant."""
    rows = list(dict.fromkeys(panel[:2] for panel in panels))
    columns = list(dict.fromkeys(variant for *_, variant in panels))
    drawing = Drawing(methods, len(rows), len(columns))
    for panel, outcomes in panels.items():
        axes = drawing.axes[rows.index(panel[:2]), columns.index(panel[2])]
        for method, outcome in outcomes.items():
            drawing.band(axes, method, outcome.env_steps, interval([outcome.curves.T]))
        axes.set(title=title(panel), xlabel="environment steps", ylabel=outcome.measure)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if outcome.measure == "success":
            axes.set_ylim(-0.02, 1.02)
    said = "Mean and 95 % bootstrap interval over seeds; all play the same held-out episodes."
    drawing.save(path, f"{about} {said}".strip())


def draw_summary(groups: dict[str, Outcomes], methods: list[str], path: Path) -> None:
    """Draw interquartile mean, performance profile and probability of improvement of the areas."""
    baselines = [name for name in BASELINES if name in methods]
    drawing = Drawing(methods, len(groups), 2 + len(baselines))
    for (means, profiles, *others), (name, found) in zip(drawing.axes, groups.items(), strict=True):
        areas = {m: [outcome.area for outcome in tasks] for m, tasks in found.items()}
        drawing.points(means, {m: interval(a, interquartile_mean) for m, a in areas.items()})
        means.set(title=name, xlabel="interquartile mean of the area")
        every = np.concatenate([runs for strata in areas.values() for runs in strata])
        levels = np.linspace(every.min(), every.max(), 51)
        for method, strata in areas.items():
            drawing.band(profiles, method, levels, profile(strata, levels), marker="")
        profiles.set(xlabel="area", ylabel="share of runs above", ylim=(-0.02, 1.02))
        for axes, baseline in zip(others, baselines, strict=True):
            better = {
                method: interval([*strata, *areas[baseline]], probability_of_improvement)
                for method, strata in areas.items()
                if baseline in areas and method != baseline
            }
            drawing.points(axes, better)
            axes.axvline(0.5, color="grey", linewidth=1)
            axes.set(xlabel=f"probability: above {baseline}", xlim=(-0.05, 1.05))
            axes.set_yticklabels([])
    drawing.save(path, "Areas under the curves, with 95 % bootstrap intervals over seeds.")


def draw_gains(panels: Panels, methods: list[str], path: Path) -> None:
    """Draw areas minus a baseline's over the variants: a row per task, a column per baseline."""
    rows = list(dict.fromkeys(panel[:2] for panel in panels))
    baselines = [name for name in BASELINES if name in methods]
    drawing = Drawing(methods, len(rows), len(baselines))
    for row, place in zip(drawing.axes, rows, strict=True):
        found = {panel[2]: outcomes for panel, outcomes in panels.items() if panel[:2] == place}
        for axes, baseline in zip(row, baselines, strict=True):
            for method in methods:
                gains = {
                    i: interval(differences)
                    for i, outcomes in enumerate(found.values())
                    if method != baseline and {method, baseline} <= outcomes.keys()
                    if (differences := paired([outcomes[method]], [outcomes[baseline]]))
                }
                if gains:
                    drawing.band(axes, method, list(gains), np.stack(list(gains.values()), axis=1))
            axes.axhline(0, color="grey", linewidth=1)
            axes.set_xticks(range(len(found)), list(found))
            axes.set(title=title(place), ylabel=f"area minus {baseline}'s")
    drawing.save(path, "Differences in area, paired by seed: mean and 95 % bootstrap interval.")


def gains_in_grid(
    found: dict[str, Outcome], method: str, baseline: str, grid: dict[str, list[Any]]
) -> Array:
    """Mean differences in area with each judge of a grid, NaN where there is none: ``[Y, X]``."""
    gains = []
    for judge in crossed(grid):
        both = [found.get(f"{method} ({judge})"), found.get(baseline)]
        differences = paired([both[0]], [both[1]]) if both[0] and both[1] else []
        gains.append(differences[0].mean() if differences else np.nan)
    return np.reshape(gains, [len(values) for values in grid.values()])


def draw_grid(panels: Panels, grid: dict[str, list[Any]], path: Path) -> None:
    """Draw mean differences in area over two settings: a row per method, a column per baseline."""
    baselines = [name for name in BASELINES if any(name in found for found in panels.values())]
    rows = {
        (panel, name.split(" (")[0]): found
        for panel, found in panels.items()
        for name in found
        if any(name.endswith(f" ({judge})") for judge in crossed(grid))
    }
    if not rows or not baselines:
        return
    (down, ys), (across, xs) = grid.items()
    size = (1.8 + 0.7 * len(xs)) * len(baselines), (1.0 + 0.5 * len(ys)) * len(rows) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    drawn = figure.subplots(len(rows), len(baselines), squeeze=False)
    for row, ((panel, method), found) in zip(drawn, rows.items(), strict=True):
        for axes, baseline in zip(row, baselines, strict=True):
            gains = gains_in_grid(found, method, baseline, grid)
            image = axes.imshow(gains, "RdBu", vmin=-0.5, vmax=0.5, origin="lower", aspect="auto")
            for (y, x), gain in np.ndenumerate(gains):
                axes.text(x, y, f"{gain:+.2f}", ha="center", va="center", fontsize="small")
            axes.set_xticks(range(len(xs)), xs)
            axes.set_yticks(range(len(ys)), ys)
            axes.set_title(title((panel[2], f"{method} minus {baseline}")), fontsize="medium")
            axes.set(xlabel=across.split(".")[-1], ylabel=down.split(".")[-1])
    figure.colorbar(image, ax=drawn, label="mean difference in area, paired by seed")
    save(figure, path)


def report(
    results: Rows,
    out: Path,
    about: str,
    notes: list[str],
    console: Console,
    grid: dict[str, list[Any]],
) -> None:
    """Print the tables, write ``table.md`` and the figures, say where the logs lie.

    Args:
        results: Rows of ``results.csv``.
        out: Where the files go.
        about: What the study shows.
        notes: What else there is to say of the runs.
        console: Where the tables are printed.
        grid: Two settings of the judge and their values, to be drawn as a map; or nothing.
    """
    panels = panels_of(results)
    groups = groups_of(panels)
    methods = list(dict.fromkeys(method for outcomes in panels.values() for method in outcomes))
    write_tables(groups, about, notes, out / "table.md", console)
    draw_curves(panels, methods, about, out / "curves")
    draw_summary(groups, methods, out / "summary")
    if len({variant for *_, variant in panels}) > 1 and set(methods) & set(BASELINES):
        draw_gains(panels, methods, out / "gains")
    if grid:
        draw_grid(panels, grid, out / "grid")
    message = f"curves: {out / 'curves.png'}; logs: tensorboard --logdir {out}"
    console.print(message, soft_wrap=True)
