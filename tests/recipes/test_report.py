"""The figures of a run and of a comparison against values worked by hand."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.replay import Uniform
from recipes.running.metrics import Telemetry, read_rows
from recipes.running.report import (
    Drawing,
    Outcome,
    against_table,
    difference,
    draw_gains,
    draw_grid,
    gains_in_grid,
    groups_of,
    improvement,
    outcome_of,
    paired,
    panels_of,
    report,
    steps_cell,
    write_tables,
)
from recipes.running.results import unscored
from recipes.running.statistics import (
    interquartile_mean,
    interval,
    probability_of_improvement,
    profile,
)
from recipes.settings import Training
from recipes.tasks import DoorKey
from vlmrb_torchrl import VLMReplayBuffer
from vlmrb_torchrl.checks import ConfigError

STEPS = np.array([100.0, 200.0, 300.0, 400.0])


def outcome(*curves, seeds=None):
    seeds = list(range(len(curves))) if seeds is None else seeds
    return Outcome(seeds, STEPS, np.array(curves, float), np.full(len(curves), 1000.0))


def row(method="uer", seed=0, env_steps=100, success="", **others):
    place = {"study": "s", "algorithm": "dqn", "task": "t", "judge": "", "variant": ""}
    measured = {"seconds": 1.0, "return": 0.0, "length": 1.0, "success": success}
    return {**place, **measured, "method": method, "seed": seed, "env_steps": env_steps, **others}


def tables(rows, path):
    write_tables(groups_of(panels_of(rows)), "", [], path, Console(file=io.StringIO()))
    return path.read_text()


def test_runs_that_were_evaluated_at_other_steps_share_no_axis():
    one, other = [row(env_steps=steps) for steps in (100, 200)], [row(seed=1, env_steps=100)]
    with pytest.raises(
        ConfigError, match=r"evaluations of uer, seed 1, is \[100\]: .*\[100, 200\]"
    ):
        outcome_of([*one, *other])
    # Each method has its own axis; areas over other evaluations are not subtracted.
    outcomes = {"uer": [outcome_of(one)], "per": [outcome_of(other)]}
    for compared in (difference, improvement):
        assert against_table(outcomes, "", compared)[1:] == [
            ["uer", "", "not comparable"],
            ["per", "not comparable", ""],
        ]


def test_differences_are_of_the_seeds_that_both_have():
    mine = outcome([1, 1, 1, 1], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], seeds=[5, 3, 4])
    theirs = outcome([0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5], seeds=[4, 5])
    (differences,) = paired([mine], [theirs])
    assert sorted(differences.tolist()) == [0.25, 0.5]  # of seeds 4 and 5
    assert paired([mine], [outcome([1, 1, 1, 1], seeds=[9])]) == []


def test_area_is_the_mean_over_evaluations():
    # (0 + 0.5 + 1 + 1) / 4 and (0 + 0 + 0 + 1) / 4
    assert outcome([0, 0.5, 1, 1], [0, 0, 0, 1]).area.tolist() == [0.625, 0.25]


def test_steps_to_level_is_the_first_evaluation_at_it_and_infinite_if_never():
    assert outcome([0, 0.8, 0.1, 1], [0, 0.79, 0, 0]).steps_to_level.tolist() == [200.0, np.inf]


def test_median_of_unreached_runs_is_shown_as_beyond_the_budget():
    curves = Outcome([0, 1], 1000 * STEPS, np.array([[0, 0, 0, 0], [0, 0, 0, 1]]), np.ones(2))
    # Bootstrap medians are 400k (both draws of the second), beyond (both of the first), or their
    # mean, beyond too; each bound has at least a quarter of the draws.
    assert steps_cell(curves) == "> 400k (1/2) [400k, > 400k]"


def test_interval_holds_the_mean_and_a_single_seed_has_none():
    mean, low, high = interval([np.array([0.0, 1.0, 0.0, 1.0, 0.5])])
    assert mean == 0.5
    assert 0 < low < 0.5 < high < 1
    mean, low, high = interval([np.array([0.3])])
    assert mean == 0.3
    assert np.isnan([low, high]).all()
    assert interval([np.array([0.3, 0.3])]).tolist() == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(("seeds", "coverage"), [(3, 0.76), (10, 0.90)])
def test_bootstrap_interval_of_few_seeds_is_as_narrow_as_its_docstring_says(seeds, coverage):
    samples = np.random.default_rng(0).normal(size=(400, seeds))
    _, low, high = interval([samples], resamples=1000)
    held = np.mean((low <= 0) & (high >= 0))
    assert held == pytest.approx(coverage, abs=0.05)


def test_bootstrap_interval_is_close_to_the_normal_one_for_many_seeds():
    # Mean of n normal numbers: the 95 % interval is mean ± 1.96 s / sqrt(n).
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = interval([values])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)


def test_strata_are_drawn_apart_and_their_runs_counted_together():
    """Two tasks without spread have an interval without width, however far they lie apart."""
    tasks = [np.full(4, 0.25), np.full(4, 0.75)]
    assert interval(tasks).tolist() == [0.5, 0.5, 0.5]
    mean, low, high = interval([np.concatenate(tasks)])
    assert low < mean == 0.5 < high


def test_interquartile_mean_is_of_the_middle_half():
    # 0 and 1 go below, 8 and 9 above; runs of both tasks together.
    assert interquartile_mean(np.array([9.0, 0, 3, 5]), np.array([4.0, 1, 8, 2])) == 3.5


def test_probability_of_improvement_counts_pairs_within_each_task():
    # First task: 3 > 1, 3 > 2, 2 > 1 of four pairs, and half of 2 = 2; second: none of two.
    mine, theirs = [np.array([3.0, 2]), np.array([0.0])], [np.array([1.0, 2]), np.array([1.0, 5])]
    assert probability_of_improvement(*mine, *theirs) == (3.5 / 4 + 0) / 2


def test_profile_is_the_share_of_runs_above_each_level():
    shares, low, high = profile([np.array([0.1, 0.5]), np.array([0.5, 0.9])], np.array([0, 0.5, 1]))
    assert shares.tolist() == [1.0, 0.25, 0.0]
    assert low.tolist() == [1.0, 0.0, 0.0]
    assert high.tolist() == [1.0, 0.5, 0.0]  # the first task has none above


def test_statistics_are_those_of_rliable():
    library, metrics = (pytest.importorskip(f"rliable.{name}") for name in ("library", "metrics"))
    scores, others = np.random.default_rng(0).normal((0.4, 0.5, 0.8), 0.2, (2, 10, 3)).round(2)
    levels = np.linspace(0, 1, 11)
    mine, theirs = list(scores.T), list(others.T)
    np.random.seed(0)  # noqa: NPY002 - rliable's source of random numbers

    def same(centre, bounds, expected, intervals):
        np.testing.assert_allclose(centre, expected["x"], rtol=1e-12)
        np.testing.assert_allclose(bounds, intervals["x"].reshape(np.shape(bounds)), atol=0.02)

    def estimates(x, statistic):
        return library.get_interval_estimates(
            {"x": x}, lambda *x: np.array([statistic(*x)]), reps=1000
        )

    centre, *bounds = interval(mine, interquartile_mean)
    same(centre, bounds, *estimates(scores, metrics.aggregate_iqm))
    centre, *bounds = interval([*mine, *theirs], probability_of_improvement)
    same(centre, bounds, *estimates([scores, others], metrics.probability_of_improvement))
    centre, *bounds = profile(mine, levels)
    expected = library.create_performance_profile({"x": scores}, levels)
    np.testing.assert_allclose(centre, expected[0]["x"], rtol=1e-12)
    np.testing.assert_allclose(bounds, expected[1]["x"], atol=0.04)


def test_report_writes_tables_and_figures_and_pairs_differences_by_seed(tmp_path):
    rows = [
        row(method, seed, env_steps, 0.2 * seed + lift)
        for method, lift in (("uer", 0.0), ("vlm_rb", 0.25))
        for seed in range(3)
        for env_steps in (100, 200)
    ]
    assert panels_of(rows)["t", "dqn", ""]["uer"].speed.tolist() == [200.0] * 3
    console = Console(file=io.StringIO(), width=200)
    report(rows, tmp_path, "What is shown.", ["Not finished: t-dqn-vlm_rb-s3."], console, {})
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("What is shown.\n\n")
    # Seeds differ, the paired difference does not: its interval has no width.
    assert "| vlm_rb | 0.25 [0.25, 0.25] |" in table
    assert "0.20 [0.00, 0.40]" in table  # mean of 0, 0.2, 0.4
    # 0.25 is above 0 and 0.2, 0.45 and 0.65 above all: 8 of 9 pairs.
    assert "| vlm_rb | 0.89 [" in table
    assert "all methods and seeds play the same ones" in table
    assert "Not finished: t-dqn-vlm_rb-s3." in table
    assert "tensorboard --logdir" in console.file.getvalue()
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"table.md"} | {
        f"{name}.{kind}" for name in ("curves", "summary") for kind in ("png", "svg")
    }


def test_a_study_of_several_tasks_and_variants_has_a_panel_for_each(tmp_path):
    rows = [
        row(method, seed, env_steps, 0.1 * seed, task=task, variant=variant, judge=judge)
        for task in ("a", "b")
        for variant in ("1 per 8", "1 per 16")
        for method, judge in (("per", ""), ("vlm_rb", "noisy"))
        for seed in range(2)
        for env_steps in (100, 200)
        if (task, variant, method) != ("b", "1 per 16", "vlm_rb")  # of which none has finished
    ]
    table = tables(rows, tmp_path / "table.md")
    titles = [line.split(":")[0] for line in table.splitlines() if ": mean" in line]
    assert titles == [
        *("a, dqn, 1 per 8", "a, dqn, 1 per 16", "b, dqn, 1 per 8", "b, dqn, 1 per 16"),
        *("all tasks, dqn, 1 per 8", "all tasks, dqn, 1 per 16"),
    ]
    assert table.count("| vlm_rb (noisy) | 2 |") == 3
    assert table.count("| vlm_rb (noisy) | 4 |") == 1


def test_gains_are_drawn_over_the_variants_that_have_both_methods(tmp_path, monkeypatch):
    lifts = {"1 per 8": {"per": 0.0, "a": 0.1}, "1 per 16": {"per": 0.0, "a": 0.2, "b": 0.4}}
    rows = [
        row(method, seed, 100, 0.1 * seed + lift, variant=variant)
        for variant, methods in lifts.items()
        for method, lift in methods.items()
        for seed in range(2)
    ]
    drawn = {}
    monkeypatch.setattr(
        Drawing, "band", lambda _, axes, method, x, y: drawn.update({method: (x, y.round(9))})
    )
    monkeypatch.setattr(Drawing, "save", lambda *_: None)
    draw_gains(panels_of(rows), ["per", "a", "b"], tmp_path / "gains")
    assert {m: (x, y.tolist()) for m, (x, y) in drawn.items()} == {
        "a": ([0, 1], [[0.1, 0.2]] * 3),  # the same for every seed
        "b": ([1], [[0.4]] * 3),
    }


def test_a_grid_of_judges_is_drawn_against_each_baseline(tmp_path):
    grid = {"scoring.a.recall": [0.5, 1], "scoring.b": [0, 10, 20]}
    lifts = {"recall 0.5, b 0": 0.0, "recall 0.5, b 20": -0.1, "recall 1, b 0": 0.2}
    methods = {("per", ""): 0.0} | {("vlm_rb", judge): lift for judge, lift in lifts.items()}
    methods["vlm_rb", "late"] = 9.0  # a judge beside the grid
    rows = [
        row(method, seed, 100, 0.1 * seed + lift, judge=judge)
        for (method, judge), lift in methods.items()
        for seed in range(2)
    ]
    (found,) = panels_of(rows).values()
    gains = gains_in_grid(found, "vlm_rb", "per", grid)
    none = np.nan
    np.testing.assert_allclose(gains, [[0.0, none, -0.1], [0.2, none, none]], atol=1e-12)
    draw_grid(panels_of(rows), grid, tmp_path / "grid")
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "grid.svg"}


def test_task_that_knows_no_success_is_reported_by_its_return(tmp_path):
    rows = [row(env_steps=steps, **{"return": r}) for steps, r in ((100, -300.0), (200, -150.0))]
    header, _, only = tables(rows, tmp_path / "table.md").splitlines()[2:5]
    named = "method | runs | final return | area under curve | its interquartile mean | env steps/s"
    assert header == f"| {named} |"
    area = "-225.00 [nan, nan]"
    assert only == f"| uer | 1 | -150.00 [nan, nan] | {area} | {area} | 200 [nan, nan] |"


def test_runs_that_lost_clips_are_named(tmp_path):
    for name, dropped in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        row = {"scoring/clips_submitted": 9, "scoring/clips_dropped": dropped}
        row |= {"env_steps": 1, "scoring/clips_failed": 1 if dropped else 0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert unscored([tmp_path / "a"]) == []
    assert unscored([tmp_path / "a", tmp_path / "b"]) == ["Clips that got no score: b 4 of 9."]


def test_clips_are_shown_with_their_scores_at_a_row_and_after_each_distance(tmp_path):
    """A grid of 8 columns, of 8 x 8 pixels each, holds 10 frames in two rows."""
    clip = torch.zeros(10, 3, 8, 8, dtype=torch.uint8), 0.25
    scoring = SimpleNamespace(statistics=dict, showcase=lambda: {"best": clip})
    training = Training(log_every_env_steps=32, strip_every_env_steps=64, progress=False)
    buffer = VLMReplayBuffer()
    with Telemetry(Fabric(accelerator="cpu"), DoorKey(), training, tmp_path) as telemetry:
        for env_steps in range(16, 161, 16):
            telemetry.log(env_steps, Uniform(), buffer, scoring)
    assert [row["env_steps"] for row in read_rows(tmp_path)] == [32, 64, 96, 128, 160]
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = events.Images("clips/best")
    assert [(image.step, image.width, image.height) for image in shown] == [
        (64, 64, 16),
        (128, 64, 16),
    ]
    assert [point.value for point in events.Scalars("clips/best_score")] == [0.25, 0.25]
