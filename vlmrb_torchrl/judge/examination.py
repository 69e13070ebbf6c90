"""The whole way: clips, scores, verdicts, and the files that tell of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict

from vlmrb_torchrl.checks import require
from vlmrb_torchrl.judge import dataset
from vlmrb_torchrl.judge.asking import Cost, Judge, judges
from vlmrb_torchrl.judge.collection import behaviour, collect
from vlmrb_torchrl.judge.figures import Answers, best_threshold, estimate
from vlmrb_torchrl.judge.gallery import data_uri, gallery, page
from vlmrb_torchrl.judge.plots import draw
from vlmrb_torchrl.judge.report import (
    Rows,
    Verdict,
    accuracy_rows,
    cost_rows,
    every_number,
    markdown,
    notes,
    versions,
    warnings,
)
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.keys import EVENTS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ACCURACY, COST = "Answers against the simulator", "Cost"


@dataclass(frozen=True)
class Examination:
    """What came out: one verdict for each scorer and question, one cost for each scorer."""

    settings: Settings
    clips: TensorDict
    judges: list[Judge]
    verdicts: list[Verdict]
    costs: list[Cost]

    @property
    def tables(self) -> dict[str, Rows]:
        """The report's tables by title."""
        stride = self.settings.stride or self.settings.clip_transitions
        return {ACCURACY: accuracy_rows(self.verdicts), COST: cost_rows(self.costs, stride)}


def examine(settings: Settings, progress: Progress) -> Examination:
    """Judge the judges.

    Args:
        settings: What to play, cut, show and ask.
        progress: Gets a bar for each stage.

    Raises:
        ConfigError: A scorer does not load or fails, or the policy cannot act.
    """
    torch.set_num_threads(settings.torch_threads)
    asked = judges(settings)
    if settings.load is None:
        behaviour(settings)  # who cannot act is told of before anything is loaded
    bar = progress.add_task("load judges", total=len(asked))
    for judge in asked:
        judge.load()  # as is one that does not load
        progress.advance(bar)
    clips = _clips(settings, progress)
    verdicts, costs = [], []
    for judge in asked:
        bar = progress.add_task(f"ask {judge.name[:40]}", total=len(clips))
        scores, cost = judge.answers(clips, partial(progress.advance, bar))
        costs.append(cost)
        for question, score in zip(judge.questions, scores.T, strict=True):
            columns = [settings.env.event_names.index(event) for event in question.events]
            answers = Answers(
                score=score,
                label=clips[EVENTS][:, columns].any(-1).numpy(),
                shown=clips["shown"][:, columns].any(-1).numpy(),
                episode=clips["episode"].numpy(),
            )
            estimates = estimate(answers, settings.threshold, settings.resamples, settings.seed)
            best = best_threshold(score, answers.label)
            verdicts.append(Verdict(question, answers, estimates, best))
    return Examination(settings, clips, asked, verdicts, costs)


def _clips(settings: Settings, progress: Progress) -> TensorDict:
    if settings.load is None:
        bar = progress.add_task("play", total=settings.clips)
        return collect(settings, partial(progress.advance, bar))
    clips = dataset.load(settings.load)
    known = clips[EVENTS].shape[-1]
    require(
        known == len(settings.env.event_names),
        "load",
        settings.load,
        f"its clips know {known} events, {type(settings.env).__name__} reports others",
    )
    return clips


def keep(result: Examination, arguments: dict[str, Any]) -> None:
    """Write the scored clips to ``settings.save``."""
    settings, verdicts = result.settings, result.verdicts
    assert settings.save is not None
    clips = result.clips.copy()
    clips["scores"] = torch.from_numpy(np.stack([v.answers.score for v in verdicts], -1))
    clips["labels"] = torch.from_numpy(np.stack([v.answers.label for v in verdicts], -1))
    meta = {
        "arguments": arguments,
        "versions": versions(),
        "event_names": list(settings.env.event_names),
        "columns": [
            {
                "scorer": repr(judge.scorer),
                "fingerprint": judge.scorer.fingerprint,
                "prompts": question.prompts,
                "events": question.events,
            }
            for judge in result.judges
            for question in judge.questions
        ],
    }
    dataset.save(settings.save, clips, meta)


def write(result: Examination, arguments: dict[str, Any], command: str) -> Path:
    """Write ``report.html``, ``report.md``, ``report.png`` and ``figures.json``.

    Args:
        result: What came out.
        arguments: What it was made from, as plain data.
        command: What was typed.

    Returns:
        The page to open.
    """
    settings, out = result.settings, result.settings.out
    verdicts, threshold = result.verdicts, settings.threshold
    out.mkdir(parents=True, exist_ok=True)
    said = notes(verdicts, result.clips, settings)
    title = type(settings.env).__name__
    numbers = every_number(verdicts, result.costs, result.clips, settings, arguments)
    (out / "figures.json").write_text(numbers)
    tables = [f"## {name}\n\n{markdown(rows)}" for name, rows in result.tables.items()]
    head = f"# Judges of {title}\n\n`{command}`\n"
    (out / "report.md").write_text(
        "\n".join([head, *tables, *(f"- {line}" for line in said)]) + "\n"
    )
    figure = draw(verdicts, threshold)
    (out / "report.png").write_bytes(figure)
    scorers = {judge.name: repr(judge.scorer) for judge in result.judges}
    made = {"command": command, **scorers, **versions(), **arguments}
    html = page(
        title=title,
        subtitle=f"{datetime.now():%Y-%m-%d}, {len(result.clips)} clips",
        tables=[{"title": name, "rows": rows} for name, rows in result.tables.items()],
        notes=said,
        figure=data_uri(figure),
        dark_figure=data_uri(draw(verdicts, threshold, dark=True)),
        gallery=gallery(verdicts, result.clips, settings),
        made="\n".join(f"{name}: {value}" for name, value in made.items()),
    )
    (out / "report.html").write_text(html)
    return out / "report.html"


def show(result: Examination, console: Console) -> None:
    """Print the tables on their side, which a terminal is wide enough for."""
    from rich.markup import escape
    from rich.table import Table

    for title, rows in result.tables.items():
        header, *rest = zip(*rows, strict=True)
        table = Table(*map(escape, header), title=title, title_justify="left")
        for line in rest:
            table.add_row(*(escape(cell.replace(" [", "\n[")) for cell in line))
        console.print(table)
    for warning in warnings(result.verdicts):
        console.print(warning, markup=False, soft_wrap=True)
