"""How good a judge is, in numbers that say how sure they are.

Clips of one episode resemble each other, so the intervals are bootstrapped over episodes.

N: clips, M: episodes, R: resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

CONFIDENCE_Z = 1.96
CALIBRATION_BINS = 10
_CHUNK = 4_000_000  # weights held at once


@dataclass(frozen=True)
class Answers:
    """What a judge said about clips, and what happened in them: ``[N]`` each."""

    score: Array  # in [0, 1]
    label: Bools  # what was asked about happened in the clip
    shown: Bools  # it happened after the first frame shown, so a change can be seen
    episode: NDArray[np.int64]  # which episode the clip is of, any integers


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"– ({self.reason})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Threshold:
    """The score from which a Yes gives the greatest F1, and what it gives."""

    value: float
    f1: float
    precision: float
    recall: float


def wilson(successes: float, trials: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson 1927); NaN where there were no trials."""
    if trials == 0:
        return math.nan, math.nan, math.nan
    share, z2 = successes / trials, CONFIDENCE_Z**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = CONFIDENCE_Z / (1 + z2 / trials)
    half *= math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def area_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an area under the ROC curve that holds at 0 and 1, too.

    Source:
        Newcombe 2006, Statistics in Medicine 25:559, method 5: the true areas that lie within
        1.96 of their own standard errors (Hanley & McNeil 1982) of the one observed. With one
        positive and one negative it is Wilson's interval.
    """
    from scipy.optimize import brentq

    extra = (positives + negatives) / 2 - 1

    def outside(true: float) -> float:
        spread = 1 + extra * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * spread / (positives * negatives)
        return float((true - area) ** 2 - CONFIDENCE_Z**2 * variance)

    # At 0 and 1 themselves the error vanishes: look a hair beside them.
    low = brentq(outside, 0.0, min(area, 1 - 1e-9)) if area > 0 else 0.0
    high = brentq(outside, max(area, 1e-9), 1.0) if area < 1 else 1.0
    return low, high


def area_under_curve(score: Array, label: Bools, weights: Array | None = None) -> Array:
    """Probability that a positive clip scores above a negative one, ties counting half.

    Args:
        score: ``[N]``.
        label: ``[N]``.
        weights: How often each clip counts, ``[R, N]``; None: once each, R = 1.

    Returns:
        ``[R]``; NaN where no positive or no negative counts.
    """
    weights = np.ones((1, len(score))) if weights is None else weights
    if not len(score):
        return np.full(len(weights), np.nan)
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # of runs of equal scores
    ordered = weights[:, order]
    positive = np.add.reduceat(ordered * label[order], starts, axis=1)
    negative = np.add.reduceat(ordered * ~label[order], starts, axis=1)
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore"):
        area: Array = (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
    return area


@dataclass(frozen=True)
class _Measure:
    """One measure of a judge."""

    of: Callable[[Array], Array]  # its value [R] by how often each clip counts, [R, N]; or NaN
    about: tuple[Bools, ...]  # masks [N] of the clips it is about; undefined if one holds none
    missing: tuple[str, ...] = ("",)  # what is missing then, for each mask


def _share(hits: Bools, about: Bools, missing: str = "") -> _Measure:
    """The share of hits among the clips that it is about."""
    return _Measure(
        lambda weights: weights @ (hits & about) / (weights @ about), (about,), (missing,)
    )


def _measures(answers: Answers, threshold: float) -> dict[str, _Measure]:
    score, label = answers.score, answers.label
    yes, off, every = score >= threshold, score - label, np.ones_like(label)
    by_bin = off[:, None] * (_bins(score)[:, None] == np.arange(CALIBRATION_BINS))
    none, no_negative = "no positive clip", "no negative clip"
    return {
        "base_rate": _share(label, every),
        "precision": _share(label, yes, "no Yes"),
        "recall": _share(yes, label, none),
        "recall_shown": _share(yes, label & answers.shown, "no clip shows it"),
        "false_positive_rate": _share(yes, ~label, no_negative),
        "auc": _Measure(
            lambda weights: area_under_curve(score, label, weights),
            (label, ~label),
            (none, no_negative),
        ),
        "brier": _Measure(lambda weights: weights @ off**2 / weights.sum(1), (every,)),
        # n_b / N |mean score − share of positives|, summed over bins b
        "ece": _Measure(lambda weights: np.abs(weights @ by_bin).sum(1) / weights.sum(1), (every,)),
    }


def estimate(
    answers: Answers, threshold: float, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Every measure with its 95 % interval: percentiles of a bootstrap over episodes.

    Where all resamples agree, as at a precision of 1, there is nothing to take percentiles of:
    the interval is then Wilson's (for the AUC Newcombe's), each *episode* counting as one trial,
    since its clips agree, too.

    A score from ``threshold`` on is a Yes.
    """
    N = len(answers.score)
    _, episode = np.unique(answers.episode, return_inverse=True)
    M = int(episode.max()) + 1
    random = np.random.default_rng(seed)
    measures = _measures(answers, threshold)
    spread: dict[str, list[Array]] = {name: [] for name in measures}
    with np.errstate(invalid="ignore"):
        for first in range(0, resamples, few := max(1, _CHUNK // N)):
            rows = min(few, resamples - first)
            weights = random.multinomial(M, np.full(M, 1 / M), size=rows)[:, episode].astype(float)
            for name, measure in measures.items():
                spread[name].append(measure.of(weights))
    return {
        name: _estimate(measure, np.concatenate(spread[name]), episode)
        for name, measure in measures.items()
    }


def _estimate(measure: _Measure, spread: Array, episode: NDArray[np.int64]) -> Estimate:
    trials = [len(np.unique(episode[mask])) for mask in measure.about]
    if 0 in trials:
        return Estimate(None, reason=measure.missing[trials.index(0)])
    value = float(measure.of(np.ones((1, len(episode))))[0])
    low, high = np.nanquantile(spread, [0.025, 0.975]).tolist()
    if math.isclose(low, high, abs_tol=1e-12):
        if len(trials) > 1:
            low, high = area_interval(value, *trials)
        else:
            _, low, high = wilson(value * trials[0], trials[0])
    # The calibration error is biased upwards, in resamples more than in what they are drawn from.
    return Estimate(value, min(low, value), max(high, value))


def by_threshold(score: Array, label: Bools) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """What each threshold says that tells clips apart, the highest first.

    Returns:
        The thresholds, which are the scores that occur; how many clips get a Yes from them, and
        how many of these are positives.
    """
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    ends = np.flatnonzero(np.diff(ranked, append=-np.inf))  # last of equal scores
    return ranked[ends], ends + 1, label[order].cumsum()[ends]


def best_threshold(score: Array, label: Bools) -> Threshold | None:
    """The threshold of the greatest F1 on these very clips; None without a positive clip.

    It lies half-way to the next lower score, where there is one.
    """
    if not label.any():
        return None
    scores, said, right = by_threshold(score, label)
    f1 = 2 * right / (said + label.sum())
    k = int(f1.argmax())
    value, precision, recall = scores[k : k + 2].mean(), right[k] / said[k], right[k] / label.sum()
    return Threshold(float(value), float(f1[k]), float(precision), float(recall))


def reliability(answers: Answers) -> list[dict[str, float]]:
    """What happened, by what was said: one entry per bin of scores that holds clips.

    The interval is Wilson's, each episode in the bin counting as one trial.
    """
    bins = _bins(answers.score)
    rows = []
    for k in np.unique(bins):
        inside = bins == k
        share = float(answers.label[inside].mean())
        trials = len(np.unique(answers.episode[inside]))
        _, low, high = wilson(share * trials, trials)
        rows.append(
            {
                "from": k / CALIBRATION_BINS,
                "to": (k + 1) / CALIBRATION_BINS,
                "clips": int(inside.sum()),
                "mean_score": float(answers.score[inside].mean()),
                "share_positive": share,
                "low": low,
                "high": high,
            }
        )
    return rows


def _bins(score: Array) -> NDArray[np.int64]:
    """The calibration bin of each score; 1 is in the last."""
    bins: NDArray[np.int64] = np.minimum(
        (score * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1
    )
    return bins
