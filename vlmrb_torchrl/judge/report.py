"""The report: tables, what they mean, and every number as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from tensordict import TensorDict

from vlmrb_torchrl.judge.asking import Cost, Question
from vlmrb_torchrl.judge.figures import Answers, Estimate, Threshold, reliability
from vlmrb_torchrl.judge.settings import Settings

PAPER_STRIDE = 32
"""Transitions from clip to clip in VLM-RB: each is covered once by a clip of 32."""
VERSIONED = ("vlmrb-torchrl", "torch", "torchrl", "tensordict", "transformers", "minigrid")

Rows = list[list[str]]


@dataclass(frozen=True)
class Verdict:
    """What is known about one scorer's answers to one question."""

    question: Question
    answers: Answers
    estimates: dict[str, Estimate]
    best: Threshold | None

    @property
    def positives(self) -> int:
        """Clips in which it happened."""
        return int(self.answers.label.sum())

    @property
    def unshown(self) -> int:
        """Of them, those in which it happened no later than in the first frame shown."""
        return int((self.answers.label & ~self.answers.shown).sum())


def accuracy_rows(verdicts: Sequence[Verdict]) -> Rows:
    """The table of answers, header first, one row for each scorer and question."""
    measures = {
        "precision": "precision",
        "recall": "recall",
        "recall_shown": "recall where shown",
        "auc": "AUC",
        "brier": "Brier score",
        "ece": "calibration error",
    }
    rows = [["judge", "asked", "positive clips", *measures.values(), "best threshold"]]
    for verdict in verdicts:
        clips = len(verdict.answers.score)
        best = verdict.best
        rows.append(
            [
                verdict.question.scorer,
                verdict.question.asked,
                f"{verdict.positives} of {clips}",
                *(str(verdict.estimates[name]) for name in measures),
                "–" if best is None else f"{best.value:.2f} (F1 {best.f1:.3f})",
            ]
        )
    return rows


def cost_rows(costs: Sequence[Cost], stride: int) -> Rows:
    """The table of costs, header first, one row for each scorer."""
    strides = list(dict.fromkeys((PAPER_STRIDE, stride)))
    rows = [["judge", "questions", "no score", "on", "clips/s", "clips/s, seen again"]]
    rows[0] += [f"env steps/s at stride {s}" for s in strides]
    rows[0] += [f"hours per million env steps at stride {s}" for s in strides]
    for cost in costs:
        unit = "GPU" if cost.device == "cuda" else "core"
        where = "GPU" if cost.device == "cuda" else f"CPU, threads: {cost.cores}"
        row = [cost.scorer, str(cost.questions), f"{cost.unanswered} times", where]
        row += [f"{cost.clips_per_s:,.1f}", f"{cost.clips_per_s_again:,.1f}"]
        row += [f"{cost.env_steps_per_s(s):,.0f}" for s in strides]
        row += [f"{cost.hours_per_million_env_steps(s):.3g} {unit}-hours" for s in strides]
        rows.append(row)
    return rows


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


def markdown(rows: Rows) -> str:
    """A table in Markdown."""
    escaped = [[" ".join(c.replace("|", "\\|").split()) for c in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def every_number(
    verdicts: Sequence[Verdict],
    costs: Sequence[Cost],
    clips: TensorDict,
    settings: Settings,
    arguments: dict[str, Any],
) -> str:
    """All of the report's numbers as JSON."""
    strides = (PAPER_STRIDE, settings.stride or settings.clip_transitions)
    whole = {
        "arguments": arguments,
        "versions": versions(),
        "clips": len(clips),
        "episodes": len(clips["episode"].unique()),
        "transitions_per_clip": clips["transitions"].double().mean().item(),
        "verdicts": [_numbers(verdict, settings.threshold) for verdict in verdicts],
        "costs": [
            {
                **asdict(cost),
                "env_steps_per_s": {s: cost.env_steps_per_s(s) for s in strides},
                "hours_per_million_env_steps": {
                    s: cost.hours_per_million_env_steps(s) for s in strides
                },
            }
            for cost in costs
        ],
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
