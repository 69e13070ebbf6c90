"""Three pictures of each verdict: precision and recall, reliability, scores by label."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmrb_torchrl.judge.figures import reliability
from vlmrb_torchrl.judge.report import Verdict

POSITIVE, NEGATIVE = "#2a9d8f", "#e76f51"
ROW_INCHES = 2.5


def draw(verdicts: Sequence[Verdict], threshold: float, *, dark: bool = False) -> bytes:
    """Draw one row of pictures for each verdict; return a PNG.

    Args:
        verdicts: In the order of the rows.
        threshold: From which a score is a Yes.
        dark: Light lines for a dark page.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure
    from PIL import Image

    paper = "#20242b" if dark else "white"
    settings = {"font.size": 9, "axes.facecolor": paper, "figure.facecolor": paper}
    with style.context("dark_background" if dark else "default"), rc_context(settings):
        figure = Figure(figsize=(10.5, ROW_INCHES * len(verdicts) + 0.3), layout="constrained")
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
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=-np.inf))
    found = label[order].cumsum()[ends]
    axes.plot(found / label.sum(), found / (ends + 1), color=POSITIVE, marker=".", markersize=3)
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
