"""The judge's numbers against closed forms, by-hand sums and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vlmrb_torchrl.judge.statistics import (
    CONFIDENCE_Z,
    Answers,
    area_interval,
    area_under_curve,
    best_threshold,
    estimate,
    reliability,
    wilson,
)


def answers(score, label, episode=None, shown=None) -> Answers:
    score, label = np.array(score, float), np.array(label, bool)
    episode = np.arange(len(score)) if episode is None else np.array(episode)
    return Answers(score, label, label if shown is None else np.array(shown, bool), episode)


def drawn(seed: int, clips: int = 300) -> Answers:
    """Scores that lean towards the label, many of them tied."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    label = random.random(clips) < 0.3
    score = np.round(np.clip(random.normal(0.4 + 0.3 * label, 0.25), 0, 1), 1)
    return answers(score, label)


def test_wilson_interval_of_no_error_in_a_hundred() -> None:
    """Closed form: for k = n the lower end is n / (n + z²), the upper end 1."""
    share, low, high = wilson(100, 100)
    assert (share, high) == pytest.approx((1.0, 1.0))
    assert low == pytest.approx(100 / (100 + 1.96**2))


def test_area_under_curve_counts_ties_half() -> None:
    label = np.array([True, True, False, False])
    assert area_under_curve(np.array([0.9, 0.5, 0.5, 0.1]), label).item() == 3.5 / 4


@pytest.mark.parametrize("seed", range(3))
def test_area_is_mann_whitneys(seed: int) -> None:
    a = drawn(seed)
    u = stats.mannwhitneyu(a.score[a.label], a.score[~a.label]).statistic
    area = area_under_curve(a.score, a.label).item()
    assert area == pytest.approx(u / (a.label.sum() * (~a.label).sum()))


def test_a_clips_weight_is_how_often_it_is_there() -> None:
    a, random = drawn(0, clips=40), np.random.default_rng(1)
    weights = random.integers(0, 4, (5, 40)).astype(float)
    areas = area_under_curve(a.score, a.label, weights)
    for row, area in zip(weights.astype(int), areas, strict=True):
        again = area_under_curve(a.score.repeat(row), a.label.repeat(row)).item()
        assert area == pytest.approx(again)


@pytest.mark.parametrize("area", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_area_of_one_pair_has_wilsons_interval(area: float) -> None:
    assert area_interval(area, 1, 1) == pytest.approx(wilson(area, 1)[1:], abs=1e-6)


def test_ends_of_the_areas_interval_are_as_far_off_as_their_own_error() -> None:
    m, n, area = 12, 40, 0.85
    for end in area_interval(area, m, n):
        extra = (m + n) / 2 - 1
        spread = 1 + extra * ((1 - end) / (2 - end) + end / (1 + end))
        error = np.sqrt(end * (1 - end) * spread / (m * n))
        assert abs(end - area) == pytest.approx(CONFIDENCE_Z * error)


def test_every_measure_by_hand() -> None:
    """Yes from 0.5 on. Bins of the calibration error: 0.9 and 0.9; 0.6; 0.2."""
    a = answers([0.9, 0.9, 0.6, 0.2], [1, 1, 0, 1], shown=[1, 0, 0, 1])
    found = {name: e.value for name, e in estimate(a, 0.5, resamples=10).items()}
    assert found == pytest.approx(
        {
            "base_rate": 3 / 4,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "recall_shown": 1 / 2,
            "false_positive_rate": 1.0,
            "auc": 2 / 3,
            "brier": (0.1**2 + 0.1**2 + 0.6**2 + 0.8**2) / 4,
            "ece": (2 * 0.1 + 0.6 + 0.8) / 4,
        }
    )


def test_a_yes_is_a_score_of_the_threshold_or_more() -> None:
    a = answers([0.5, 0.4], [1, 1])
    assert estimate(a, 0.5, resamples=10)["recall"].value == 0.5


@pytest.mark.parametrize("seed", range(2))
def test_intervals_agree_with_scipys_bootstrap_where_clips_are_episodes(seed: int) -> None:
    a = drawn(seed)

    def brier(rows):
        return np.mean((a.score[rows] - a.label[rows]) ** 2)

    def precision(rows):
        yes = a.score[rows] >= 0.5
        return (yes & a.label[rows]).sum() / yes.sum()

    found = estimate(a, 0.5, resamples=4000, seed=seed)
    for name, statistic in (("brier", brier), ("precision", precision)):
        interval = stats.bootstrap(
            (np.arange(len(a.score)),),
            statistic,
            n_resamples=4000,
            method="percentile",
            vectorized=False,
            rng=seed,
        ).confidence_interval
        width = interval.high - interval.low
        assert found[name].low == pytest.approx(interval.low, abs=0.06 * width)
        assert found[name].high == pytest.approx(interval.high, abs=0.06 * width)


def test_more_clips_of_the_same_episodes_make_nothing_surer() -> None:
    """Each clip five times in its episode: the same shares, and the very same intervals."""
    a = drawn(0)
    five = answers(a.score.repeat(5), a.label.repeat(5), a.episode.repeat(5))
    once, often = estimate(a, 0.5, seed=3), estimate(five, 0.5, seed=3)
    for name, value in once.items():
        assert often[name].value == pytest.approx(value.value)
        assert (often[name].low, often[name].high) == pytest.approx((value.low, value.high))


def test_a_perfect_judge_is_as_sure_as_there_are_episodes() -> None:
    """20 clips of 10 episodes, half of them positive: Wilson's n / (n + z²) over episodes."""
    label = np.arange(20) % 4 < 2
    found = estimate(answers(label, label, np.arange(20) // 2), 0.5)
    for name in ("precision", "recall"):
        assert found[name].value == found[name].high == 1
        assert found[name].low == pytest.approx(5 / (5 + 1.96**2))
    assert found["auc"].low == pytest.approx(area_interval(1.0, 5, 5)[0])
    assert found["brier"].value == found["brier"].low == 0
    assert found["brier"].high == pytest.approx(1.96**2 / (10 + 1.96**2))


def test_a_single_episode_says_next_to_nothing() -> None:
    found = estimate(answers([0.9, 0.2, 0.8], [1, 0, 0], [7, 7, 7]), 0.5)
    for value in found.values():
        assert value.high - value.low > 0.5


@pytest.mark.parametrize(
    ("score", "label", "reasons"),
    [
        ([0.9, 0.1], [0, 0], {"recall": "no positive clip", "auc": "no positive clip"}),
        ([0.9, 0.1], [1, 1], {"auc": "no negative clip", "false_positive_rate": "no negative"}),
        ([0.2, 0.1], [1, 0], {"precision": "no Yes"}),
    ],
)
def test_what_is_undefined_is_no_number_but_says_why(score, label, reasons) -> None:
    found = estimate(answers(score, label), 0.5, resamples=50)
    for name, reason in reasons.items():
        assert found[name].value is None
        assert reason in str(found[name])
        assert str(found[name]).startswith("–")
    assert not any(np.isnan(e.value) for e in found.values() if e.value is not None)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12).filter(
        lambda clips: any(label for _, label in clips)
    )
)
def test_no_threshold_has_a_greater_f1_than_the_best(clips) -> None:
    score = np.array([s / 5 for s, _ in clips])
    label = np.array([label for _, label in clips])

    def f1(threshold: float) -> float:
        yes = score >= threshold
        return 2 * (yes & label).sum() / (yes.sum() + label.sum())

    best = best_threshold(score, label)
    assert best is not None
    assert best.f1 == pytest.approx(max(f1(t) for t in np.linspace(0, 1, 51)))
    assert best.f1 == pytest.approx(f1(best.value))
    yes = score >= best.value
    assert best.precision == pytest.approx((yes & label).sum() / yes.sum())
    assert best.recall == pytest.approx((yes & label).sum() / label.sum())


def test_best_threshold_lies_half_way_between_the_scores_that_it_parts() -> None:
    best = best_threshold(np.array([0.9, 0.8, 0.2]), np.array([True, True, False]))
    assert best is not None
    assert best.value == pytest.approx(0.5)
    assert best_threshold(np.array([0.9]), np.array([False])) is None


def test_reliability_puts_every_clip_in_one_bin() -> None:
    rows = reliability(answers([0.0, 0.05, 0.95, 1.0], [0, 1, 1, 1]))
    assert [(row["from"], row["to"], row["clips"]) for row in rows] == [(0, 0.1, 2), (0.9, 1, 2)]
    assert [row["share_positive"] for row in rows] == [0.5, 1.0]
    assert rows[0]["mean_score"] == pytest.approx(0.025)
