"""What an examination leaves: tables, what they mean, pictures, clips to look at, every number.

N: clips, F: frames of a clip, U: distinct frames among them.
"""

from __future__ import annotations

import base64
import io
import json
import math
import platform
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from vlmrb_torchrl.frames import frame_digests
from vlmrb_torchrl.judge.collection import save
from vlmrb_torchrl.judge.judging import Cost, Examination, Verdict
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.judge.statistics import by_threshold, reliability
from vlmrb_torchrl.keys import CLIP, EVENTS
from vlmrb_torchrl.renderers import ClipRenderTransform

if TYPE_CHECKING:
    from rich.console import Console

VERSIONED = ("vlmrb-torchrl", "torch", "torchrl", "tensordict", "transformers", "minigrid")
OUTCOMES = ("false positive", "false negative", "true positive", "true negative")
LARGEST = 192
"""Pixels along a frame's longer edge, at most: a hundred clips stay a few megabytes."""
MEASURES = {
    "precision": "precision",
    "recall": "recall",
    "recall_shown": "recall where shown",
    "auc": "AUC",
    "brier": "Brier score",
    "ece": "calibration error",
}
"""Those of the table, and their titles."""
POSITIVE, NEGATIVE = "#2a9d8f", "#e76f51"


def write(result: Examination, arguments: dict[str, Any], command: str) -> Path:
    """Write ``report.html``, ``report.md``, ``report.png``, ``figures.json``; return the page.

    ``arguments``: what it was made from, as plain data. ``command``: what was typed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    settings, verdicts, out = result.settings, result.verdicts, result.settings.out
    out.mkdir(parents=True, exist_ok=True)
    title, told = type(settings.env).__name__, tables(result)
    said = notes(verdicts, result.clips, settings)
    (out / "figures.json").write_text(every_number(result, arguments))
    parts = [f"# Judges of {title}\n\n`{command}`\n"]
    parts += [f"## {name}\n\n{markdown(rows)}" for name, rows in told.items()]
    (out / "report.md").write_text("\n".join([*parts, *(f"- {line}" for line in said)]) + "\n")
    figure = draw(verdicts, settings.threshold)
    (out / "report.png").write_bytes(figure)
    scorers = {asked.name: repr(asked.scorer) for asked in result.scorers}
    made = {"command": command, **scorers, **versions(), **arguments}
    # All text is escaped, and the page fetches nothing from anywhere.
    jinja = Environment(
        loader=PackageLoader("vlmrb_torchrl.judge", "page"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    html = jinja.get_template("report.html").render(
        title=title,
        subtitle=f"{datetime.now():%Y-%m-%d}, {len(result.clips)} clips",
        tables=told,
        notes=said,
        figure=data_uri(figure),
        dark_figure=data_uri(draw(verdicts, settings.threshold, dark=True)),
        gallery=gallery(verdicts, result.clips, settings),
        made="\n".join(f"{name}: {value}" for name, value in made.items()),
    )
    (out / "report.html").write_text(html)
    return out / "report.html"


def show(result: Examination, console: Console) -> None:
    """Print the tables on their side, which a terminal is wide enough for."""
    from rich.markup import escape
    from rich.table import Table

    for title, rows in tables(result).items():
        header, *rest = ([name, *(row[name] for row in rows)] for name in rows[0])
        table = Table(*map(escape, header), title=title, title_justify="left")
        for line in rest:
            table.add_row(*(escape(cell.replace(" [", "\n[")) for cell in line))
        console.print(table)
    for warning in warnings(result.verdicts):
        console.print(warning, markup=False, soft_wrap=True)


def keep(result: Examination, folder: Path, arguments: dict[str, Any]) -> None:
    """Write the scored clips to ``folder``, with what they were made from."""
    answers, clips = [verdict.answers for verdict in result.verdicts], result.clips.copy()
    clips["scores"] = torch.from_numpy(np.stack([each.score for each in answers], -1))
    clips["labels"] = torch.from_numpy(np.stack([each.label for each in answers], -1))
    columns = [
        {
            "scorer": repr(asked.scorer),
            "fingerprint": asked.scorer.fingerprint,
            "prompts": question.prompts,
            "events": question.events,
        }
        for asked in result.scorers
        for question in asked.questions
    ]
    names = list(result.settings.env.event_names)
    meta = {"arguments": arguments, "versions": versions()}
    save(folder, clips, {**meta, "event_names": names, "columns": columns})


def tables(result: Examination) -> dict[str, list[dict[str, str]]]:
    """The report's tables by title: rows, by the names of their columns."""
    return {
        "Answers against the simulator": [_accuracy(verdict) for verdict in result.verdicts],
        "Cost": [_cost(cost, result.strides) for cost in result.costs],
    }


def _accuracy(verdict: Verdict) -> dict[str, str]:
    best = verdict.best
    return {
        "judge": verdict.question.scorer,
        "asked": verdict.question.asked,
        "positive clips": f"{verdict.positives} of {len(verdict.answers.score)}",
        **{title: str(verdict.estimates[name]) for name, title in MEASURES.items()},
        "best threshold": "–" if best is None else f"{best.value:.2f} (F1 {best.f1:.3f})",
    }


def _cost(cost: Cost, strides: Iterable[int]) -> dict[str, str]:
    on_gpu = cost.device == "cuda"
    unit = "GPU-hours" if on_gpu else "core-hours"
    hours = {s: cost.hours_per_million_env_steps(s) for s in strides}
    return {
        "judge": cost.scorer,
        "questions": str(cost.questions),
        "no score": f"{cost.unanswered} times",
        "on": "GPU" if on_gpu else f"CPU, threads: {cost.cores}",
        "clips/s": f"{cost.clips_per_s:,.1f}",
        "clips/s, seen again": f"{cost.clips_per_s_again:,.1f}",
        **{f"env steps/s at stride {s}": f"{cost.env_steps_per_s(s):,.0f}" for s in strides},
        **{f"hours per million env steps at stride {s}": f"{hours[s]:.3g} {unit}" for s in hours},
    }


def notes(verdicts: Sequence[Verdict], clips: TensorDict, settings: Settings) -> list[str]:
    """What the tables mean, and what they do not."""
    episodes = len(clips["episode"].unique())
    shares = {v.question.asked: f"{v.unshown} of {v.positives}" for v in verdicts}
    unshown = "; ".join(f"{asked}: {share} positives" for asked, share in shares.items())
    lines = [
        f"{len(clips)} clips of {episodes} episodes; each covers up to "
        f"{settings.clip_transitions} transitions and shows {settings.frames_per_clip} frames. "
        "A clip is a positive if what was asked about happened in any transition that it covers, "
        f"by the simulator's word. Yes: a score of {settings.threshold:g} or more.",
        "Brackets are 95 % intervals: percentiles of a bootstrap over episodes "
        f"({settings.resamples:,} resamples), since clips of one episode are not independent. "
        "Where all resamples agree (shares of 0 or 1) it is Wilson's interval, for the AUC "
        "Newcombe's, each episode counting as one trial.",
        "Recall where shown leaves out what happened no later than in the first frame shown, "
        f"where a change cannot be seen ({unshown}).",
        "Calibration error: mean distance of scores from the share of positives in 10 equal bins "
        "of scores; with few clips it comes out too large. The best threshold has the greatest F1 "
        "on these very clips: elsewhere it will do worse.",
        "No score: the judge's answer was none, which counts as a No, as in replay.",
        "Clips/s: scoring alone, warm, on this machine as it was loaded; clips in the order in "
        "which they were played, all questions of a row together. Seen again: the same clips at "
        "once again, which is faster where frames' embeddings are kept. Core-hours are processor "
        "time of this process.",
    ]
    return warnings(verdicts) + lines


def warnings(verdicts: Sequence[Verdict]) -> list[str]:
    """What cannot be told from these clips, and what to do about it."""
    lines = []
    for verdict in {verdict.question.asked: verdict for verdict in verdicts}.values():
        event = " or ".join(verdict.question.events)
        if not verdict.positives:
            remedy = "use --policy scripted, or more --clips."
            lines.append(f"No clip shows {event!r}: nothing can be said about recall; {remedy}")
        if verdict.positives == len(verdict.answers.label):
            remedy = "use --policy random, or shorter clips."
            lines.append(f"Every clip shows {event!r}: any Yes is right; {remedy}")
    return lines


def markdown(rows: list[dict[str, str]]) -> str:
    """A table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def every_number(result: Examination, arguments: dict[str, Any]) -> str:
    """All of the report's numbers as JSON."""
    settings, clips = result.settings, result.clips
    strides = result.strides
    costs = [
        {
            **asdict(cost),
            "env_steps_per_s": {s: cost.env_steps_per_s(s) for s in strides},
            "hours_per_million_env_steps": {
                s: cost.hours_per_million_env_steps(s) for s in strides
            },
        }
        for cost in result.costs
    ]
    whole = {
        "arguments": arguments,
        "versions": versions(),
        "clips": len(clips),
        "episodes": len(clips["episode"].unique()),
        "transitions_per_clip": clips["transitions"].double().mean().item(),
        "verdicts": [_numbers(verdict, settings.threshold) for verdict in result.verdicts],
        "costs": costs,
    }
    return json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _numbers(verdict: Verdict, threshold: float) -> dict[str, Any]:
    score, label = verdict.answers.score, verdict.answers.label
    yes = score >= threshold
    return {
        **asdict(verdict.question),
        "threshold": threshold,
        "true_positives": int((yes & label).sum()),
        "false_positives": int((yes & ~label).sum()),
        "false_negatives": int((~yes & label).sum()),
        "true_negatives": int((~yes & ~label).sum()),
        "positives_unshown": verdict.unshown,
        "measures": {name: asdict(value) for name, value in verdict.estimates.items()},
        "best_threshold": None if verdict.best is None else asdict(verdict.best),
        "reliability": reliability(verdict.answers),
        "scores": {
            "edges": np.linspace(0, 1, 21).tolist(),
            "positives": np.histogram(score[label], 20, (0, 1))[0].tolist(),
            "negatives": np.histogram(score[~label], 20, (0, 1))[0].tolist(),
        },
    }


def gallery(verdicts: Sequence[Verdict], clips: TensorDict, settings: Settings) -> dict[str, Any]:
    """What the page's script is given: judges with their entries, and each clip once."""
    judges: list[dict[str, Any]] = [
        {"name": v.question.name, "prompts": v.question.prompts, "entries": choose(v, settings)}
        for v in verdicts
    ]
    names, render = settings.env.event_names, ClipRenderTransform(settings.draw)
    shown = {}
    for k in sorted({entry["clip"] for judge in judges for entry in judge["entries"]}):
        clip = clips[k]
        shown[k] = {
            **sprite_sheet(render(clip.select("render_state").copy())[CLIP]),
            **{name: int(clip[name]) for name in ("episode", "first", "transitions")},
            "events": [name for name, seen in zip(names, clips[EVENTS][k], strict=True) if seen],
        }
    return {"judges": judges, "clips": shown, "outcomes": OUTCOMES}


def choose(verdict: Verdict, settings: Settings) -> list[dict[str, Any]]:
    """The clips shown of one verdict: of each outcome ``settings.gallery`` at most.

    Mistakes come in the order of how sure the judge was, right answers are drawn at random.
    """
    score, label = verdict.answers.score, verdict.answers.label
    yes = score >= settings.threshold
    random = np.random.default_rng(settings.seed)
    entries = []
    for outcome in OUTCOMES:
        right, said = outcome.startswith("true"), outcome.endswith("positive")
        found = np.flatnonzero((yes == said) & ((yes == label) == right))
        if right:
            found = random.permutation(found)
        else:
            found = found[np.argsort(-score[found] if said else score[found], kind="stable")]
        entries += [
            {"clip": int(k), "score": float(score[k]), "label": bool(label[k]), "outcome": outcome}
            for k in found[: settings.gallery]
        ]
    return entries


def sprite_sheet(frames: Tensor) -> dict[str, Any]:
    """Frames uint8 ``[F, 3, H, W]`` as one picture of the U distinct ones.

    Returns:
        ``sheet``: a PNG as a data URI, the frames in reading order; ``columns`` of it; ``size``
        of a frame (width, height); ``order``: which of the U frames is shown when.
    """
    from PIL import Image

    place: dict[bytes, int] = {}
    order = [place.setdefault(digest, len(place)) for digest in frame_digests(frames)]
    distinct = frames[[order.index(k) for k in range(len(place))]]
    if (longest := max(distinct.shape[-2:])) > LARGEST:
        height, width = (max(1, edge * LARGEST // longest) for edge in distinct.shape[-2:])
        resized = torch.nn.functional.interpolate(distinct.float(), (height, width), mode="area")
        distinct = resized.round().byte()
    U, channels, height, width = distinct.shape
    columns = math.ceil(math.sqrt(U))
    sheet = np.zeros((-(-U // columns) * columns, height, width, channels), np.uint8)
    sheet[:U] = distinct.permute(0, 2, 3, 1).cpu().numpy()
    rows = sheet.reshape(-1, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    file = io.BytesIO()
    picture = Image.fromarray(rows.reshape(-1, columns * width, channels))
    picture.save(file, "PNG", optimize=True)
    uri = data_uri(file.getvalue())
    return {"sheet": uri, "columns": columns, "size": (width, height), "order": order}


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw(verdicts: Sequence[Verdict], threshold: float, *, dark: bool = False) -> bytes:
    """Draw one row of pictures for each verdict, for a ``dark`` page or a white one; a PNG."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure
    from PIL import Image

    paper = "#20242b" if dark else "white"
    settings = {"font.size": 9, "axes.facecolor": paper, "figure.facecolor": paper}
    with style.context("dark_background" if dark else "default"), rc_context(settings):
        figure = Figure(figsize=(10.5, 2.5 * len(verdicts) + 0.3), layout="constrained")
        grid = figure.subplots(len(verdicts), 3, squeeze=False)
        for row, verdict in zip(grid, verdicts, strict=True):
            _curve(row[0], verdict, threshold)
            _reliability(row[1], verdict)
            _scores(row[2], verdict, threshold)
            name = textwrap.shorten(verdict.question.name, 70, placeholder=" …")
            row[0].set_title(name, loc="left", fontsize=10, fontweight="bold")
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return small.getvalue()


def _curve(axes: Any, verdict: Verdict, threshold: float) -> None:
    score, label = verdict.answers.score, verdict.answers.label
    axes.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.05))
    axes.grid(alpha=0.25)
    if not label.any():
        axes.text(0.5, 0.5, "no positive clip", ha="center")
        return
    _, said, right = by_threshold(score, label)
    axes.plot(right / label.sum(), right / said, color=POSITIVE, marker=".", markersize=3)
    axes.axhline(label.mean(), color="gray", linestyle=":", label="every clip a Yes")
    if (score >= threshold).any():
        at = verdict.estimates["recall"].value, verdict.estimates["precision"].value
        axes.plot(*at, "o", color=NEGATIVE, label=f"threshold {threshold:g}")
    if verdict.best is not None:
        best = verdict.best
        label_ = f"best threshold {best.value:.2f}"
        axes.plot(best.recall, best.precision, "*", color="goldenrod", markersize=9, label=label_)
    axes.legend(loc="lower left", fontsize=7)


def _reliability(axes: Any, verdict: Verdict) -> None:
    rows = reliability(verdict.answers)
    mean = np.array([row["mean_score"] for row in rows])
    share = np.array([row["share_positive"] for row in rows])
    # A single extra 1e-16 of rounding would make an error bar negative.
    below = (share - [row["low"] for row in rows]).clip(0)
    above = ([row["high"] for row in rows] - share).clip(0)
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axes.errorbar(mean, share, [below, above], fmt="o", color=POSITIVE, capsize=2, markersize=4)
    for x, y, row in zip(mean, share, rows, strict=True):
        axes.annotate(str(row["clips"]), (x, y), (5, -9), textcoords="offset points", fontsize=7)
    axes.set(xlabel="mean score", ylabel="share of positives", xlim=(-0.06, 1.18))
    axes.set(ylim=(-0.08, 1.05))
    axes.grid(alpha=0.25)


def _scores(axes: Any, verdict: Verdict, threshold: float) -> None:
    score, label = verdict.answers.score, verdict.answers.label
    bins = np.linspace(0, 1, 21)
    for clips, colour, name in (
        (score[label], POSITIVE, f"it happened ({label.sum()})"),
        (score[~label], NEGATIVE, f"it did not ({(~label).sum()})"),
    ):
        axes.hist(clips, bins, color=colour, alpha=0.65, label=name)
    axes.axvline(threshold, color="gray", linestyle=":")
    axes.set(xlabel="score", ylabel="clips", yscale="symlog", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", fontsize=7)
