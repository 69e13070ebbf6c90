"""A comparison trains what is not finished, reports failures in one line, stops its runs."""

import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from recipes import compare
from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.running.metrics import last_row
from tests.recipes.runs import held
from vlmrb_torchrl.checks import ConfigError

SHORT = [
    "--env.size=5",
    "--env.max_steps=40",
    "--training.num_envs=4",
    "--training.total_env_steps=128",
    "--training.warmup_env_steps=64",
    "--training.eval_every_env_steps=64",
    "--training.eval_episodes=2",
    "--training.log_every_env_steps=64",
    "--algorithm.hidden_features=[8]",
]


class InProcess:
    """A run's process, that has come to its end as soon as it is started."""

    def __init__(self, command, **streams):
        recipe = {"recipes.dqn": DQN, "recipes.iqn": IQN}[command[2]]
        cli.run(recipe, command[3:])
        self.poll = self.wait = lambda *timeout: 0

    def terminate(self):
        pass


def test_plan_goes_seed_by_seed_and_a_finished_run_is_known_by_its_command(tmp_path, monkeypatch):
    task = compare.CONFIGS / "doorkey_6x6"
    runs = compare.plan(task, "iqn", ["uer", "per"], [5, 6], tmp_path, [])
    assert all("recipes.iqn" in run.command for run in runs)
    assert [run.folder.name for run in runs] == ["uer_s5", "per_s5", "uer_s6", "per_s6"]
    assert not runs[0].finished()
    runs[0].folder.mkdir()
    (runs[0].folder / "finished.json").write_text(runs[0].identity())
    assert runs[0].finished()
    changed = compare.plan(task, "iqn", ["uer"], [5], tmp_path, ["--env.size=8"])
    assert not changed[0].finished()
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "executable", "another")
    (same,) = compare.plan(task, "iqn", ["uer"], [5], Path(tmp_path.name), [])
    assert same.finished()


def test_overlays_are_named_by_their_files_and_no_two_alike(tmp_path):
    task, overlay = compare.CONFIGS / "doorkey_6x6", compare.CONFIGS / "doorkey_8x8" / "per.yaml"
    (run,) = compare.plan(task, "dqn", [str(overlay)], [0], tmp_path, [])
    assert (run.method, run.folder.name) == ("per", "per_s0")
    with pytest.raises(ConfigError, match="give each another file name"):
        compare.plan(task, "dqn", ["per", str(overlay)], [0], tmp_path, [])


def test_comparison_trains_reports_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.subprocess, "Popen", InProcess)
    arguments = {"methods": ["uer", "privileged"], "seeds": 1, "extra": SHORT, "out": tmp_path}
    compare.compare(**arguments)
    assert "privileged" in capsys.readouterr().out
    assert (tmp_path / "curves.png").exists()
    assert "| uer | 0." in (tmp_path / "table.md").read_text()
    metrics = tmp_path / "uer_s0" / "metrics.jsonl"
    assert last_row(metrics.parent)["env_steps"] == 128
    written = metrics.stat().st_mtime_ns
    compare.compare(**arguments)
    assert "2 of 2 runs lie finished" in capsys.readouterr().out
    assert metrics.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="uer_s0 is of other settings; give another folder"):
        compare.compare(**{**arguments, "algorithm": "iqn"})
    assert metrics.stat().st_mtime_ns == written


def test_two_processes_never_write_one_folder(tmp_path):
    """Another comparison in ``out``; a run whose comparison was killed and which lives on."""
    with held(tmp_path), pytest.raises(SystemExit, match=f"{tmp_path} is being written by another"):
        compare.main(["--methods=[uer]", "--seeds=1", f"--out={tmp_path}"])
    run = compare.Run("a", [sys.executable, "-c", "pass"], tmp_path / "a")
    with held(run.folder):
        figures = run.folder / "metrics.jsonl"
        figures.write_text("{}\n")
        with pytest.raises(ConfigError, match="a is being written by another process"):
            run.start()
        assert figures.read_text() == "{}\n"


def test_run_without_a_checkpoint_is_repeated_by_its_own_comparison_only(tmp_path):
    run = compare.Run("a", [sys.executable, "-c", "pass"], tmp_path / "a")
    run.folder.mkdir()
    left = [run.folder / name for name in ("metrics.jsonl", "events.out.tfevents.1")]
    for path in left:
        path.write_text("{}\n")
    assert run.replaces_another()
    (run.folder / "started.json").write_text(run.identity())
    assert not run.replaces_another()
    run.start()
    assert run.process.wait() == 0
    assert not any(path.exists() for path in left)


def test_failed_run_stops_the_others_and_is_reported_in_one_line(tmp_path):
    """One process fails at once, the other would wait for its standard input for ever."""
    waits = [sys.executable, "-c", "import sys, threading; threading.Event().wait()"]
    fails = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    runs = [
        compare.Run("a", waits, tmp_path / "a"),
        compare.Run("b", fails, tmp_path / "b"),
    ]
    with pytest.raises(ConfigError, match=r"b failed: out of luck \(whole output: .*\)") as refusal:
        compare.execute(runs, 2, Progress())
    assert "\n" not in str(refusal.value)
    assert runs[0].process.poll() is not None
    assert not runs[1].finished()


@pytest.mark.slow
def test_comparison_that_was_stopped_goes_on_with_a_run_where_it_was(tmp_path, monkeypatch):
    """Stopped as its only run says that it has a checkpoint; then that run is made to end soon."""
    endless = [*SHORT, "--training.total_env_steps=10000000", "--training.eval_every_env_steps=0"]
    task = compare.CONFIGS / "doorkey_6x6"
    extra = [*endless, "--training.checkpoint_every_env_steps=64"]
    (run,) = compare.plan(task, "dqn", ["uer"], [0], tmp_path, extra)

    def saved(*_):
        if any(run.folder.glob("checkpoints/rank0/checkpoint-*")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare, "show", saved)
        with pytest.raises(KeyboardInterrupt):
            compare.execute([run], 1, Progress())
    assert run.process.returncode == 143
    rows = (run.folder / "metrics.jsonl").read_text().splitlines()
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("10000000", "128"))
    (again,) = compare.plan(task, "dqn", ["uer"], [0], tmp_path, extra)
    compare.execute([again], 1, Progress())
    assert again.finished()
    assert (run.folder / "metrics.jsonl").read_text().splitlines()[: len(rows)] == rows
    assert not (run.folder / "checkpoints").exists()
    assert "go on: python -m recipes.dqn" in (run.folder / "output.txt").read_text()


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--methods=[uer, none]", "none"),
        ("--seeds=0", "seeds is 0"),
        ("--seeds=many", "seeds"),
        ("--no_such=1", "no_such"),
        ("--jobs=0", "jobs is 0"),
        ("--configs=nowhere", "nowhere"),
        ("--methods=[]", "methods is []"),
        ("--extra=[--training.eval_every_env_steps=0]", "eval_every_env_steps is 0"),
        ("--extra=[--env.tile_size=16]", "vlm_rb: the view of env"),
    ],
)
def test_bad_argument_is_refused_in_one_line(argument, named, tmp_path):
    with pytest.raises(SystemExit) as refusal:
        compare.main([argument, f"--out={tmp_path}"])
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
