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
from recipes.running import report as reporting
from recipes.running.metrics import Telemetry, read_rows
from recipes.running.report import (
    Outcome,
    difference_rows,
    interval,
    read_outcome,
    report,
    steps_cell,
    unscored,
)
from recipes.settings import Training
from recipes.tasks import DoorKey
from vlmrb_torchrl import VLMReplayBuffer
from vlmrb_torchrl.checks import ConfigError

STEPS = np.array([100.0, 200.0, 300.0, 400.0])


def outcome(*curves):
    return Outcome(STEPS, np.array(curves, float), np.full(len(curves), 1000.0))


def evaluated(folder, *env_steps):
    folder.mkdir()
    rows = [{"env_steps": steps, "seconds": 1.0, "eval/return": 0.0} for steps in env_steps]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_runs_that_were_evaluated_at_other_steps_share_no_axis(tmp_path):
    one, other = evaluated(tmp_path / "a", 100, 200), evaluated(tmp_path / "b", 100, 300)
    with pytest.raises(ConfigError, match=r"evaluations of .*/b is \[100, 300\]: .*\[100, 200\]"):
        read_outcome([one, other])
    # Each method has its own axis; areas over other evaluations are not subtracted.
    outcomes = {"uer": read_outcome([one]), "per": read_outcome([other])}
    assert difference_rows(outcomes)[1:] == [
        ["uer", "", "other evaluations"],
        ["per", "other evaluations", ""],
    ]


def test_area_is_the_mean_over_evaluations():
    # (0 + 0.5 + 1 + 1) / 4 and (0 + 0 + 0 + 1) / 4
    assert outcome([0, 0.5, 1, 1], [0, 0, 0, 1]).area.tolist() == [0.625, 0.25]


def test_steps_to_level_is_the_first_evaluation_at_it_and_infinite_if_never():
    assert outcome([0, 0.8, 0.1, 1], [0, 0.79, 0, 0]).steps_to_level.tolist() == [200.0, np.inf]


def test_median_of_unreached_runs_is_shown_as_beyond_the_budget():
    curves = Outcome(1000 * STEPS, np.array([[0, 0, 0, 0], [0, 0, 0, 1]]), np.ones(2))
    # Bootstrap medians are 400k (both draws of the second), beyond (both of the first), or their
    # mean, beyond too; each bound has at least a quarter of the draws.
    assert steps_cell(curves) == "> 400k (1/2) [400k, > 400k]"


def test_interval_holds_the_mean_and_a_single_seed_has_none():
    mean, low, high = interval(np.array([0.0, 1.0, 0.0, 1.0, 0.5]))
    assert mean == 0.5
    assert 0 < low < 0.5 < high < 1
    mean, low, high = interval(np.array([0.3]))
    assert mean == 0.3
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize(("seeds", "coverage"), [(3, 0.76), (10, 0.90)])
def test_bootstrap_interval_of_few_seeds_is_as_narrow_as_its_docstring_says(
    seeds, coverage, monkeypatch
):
    monkeypatch.setattr(reporting, "RESAMPLES", 1000)
    samples = np.random.default_rng(0).normal(size=(400, seeds))
    bounds = [interval(sample)[1:] for sample in samples]
    held = np.mean([low <= 0 <= high for low, high in bounds])
    assert held == pytest.approx(coverage, abs=0.05)


def test_bootstrap_interval_is_close_to_the_normal_one_for_many_seeds():
    # Mean of n normal numbers: the 95 % interval is mean ± 1.96 s / sqrt(n).
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(mean - half, abs=0.02)
    assert high == pytest.approx(mean + half, abs=0.02)


def test_report_writes_table_and_curves_and_pairs_differences_by_seed(tmp_path):
    folders = {}
    for method, lift in (("uer", 0.0), ("vlm_rb", 0.25)):
        folders[method] = []
        for seed in range(3):
            folder = tmp_path / f"{method}_s{seed}"
            folder.mkdir()
            rows = [
                {"env_steps": steps, "seconds": 2.0, "eval/success": 0.2 * seed + lift}
                | {"eval/return": 0.0}
                for steps in (100, 200)
            ]
            rows.append({"env_steps": 200, "seconds": 2.0, "train/success": 0.5})
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            folders[method].append(folder)
    assert read_outcome(folders["uer"]).speed.tolist() == [100.0] * 3
    console = Console(file=io.StringIO(), width=200)
    report(folders, tmp_path, console)
    table = (tmp_path / "table.md").read_text()
    # Seeds differ, the paired difference does not: its interval has no width.
    assert "0.25 [0.25, 0.25]" in table
    assert "0.20 [0.00, 0.40]" in table  # mean of 0, 0.2, 0.4
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert "tensorboard --logdir" in console.file.getvalue()


def test_task_that_knows_no_success_is_reported_by_its_return(tmp_path):
    rows = [
        {"env_steps": steps, "seconds": 1.0, "eval/return": value}
        for steps, value in ((100, -300.0), (200, -150.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report({"uer": [tmp_path]}, tmp_path, Console(file=io.StringIO(), width=200))
    header, _, row = (tmp_path / "table.md").read_text().splitlines()[2:5]
    assert header == "| method | final return | area under curve | env steps/s |"
    assert row == "| uer | -150.00 [nan, nan] | -225.00 [nan, nan] | 200 [nan, nan] |"


def test_runs_that_lost_clips_are_named(tmp_path):
    for name, dropped in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        row = {"scoring/clips_submitted": 9, "scoring/clips_dropped": dropped}
        row |= {"env_steps": 1, "scoring/clips_failed": 1 if dropped else 0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert unscored([tmp_path / "a", tmp_path / "b"]) == "clips that got no score: b 4 of 9"


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
