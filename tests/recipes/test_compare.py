"""A comparison trains what is not finished, reports failures in one line, stops its runs."""

import csv
import json
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from recipes import compare
from recipes.compare import Study
from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli, processes
from recipes.running import runs as runs_module
from recipes.running.metrics import last_row
from recipes.running.report import Drawing
from recipes.running.runs import Run, execute, seconds_left
from tests.recipes.runs import held
from vlmrb_torchrl.checks import ConfigError

SHORT = {
    "env": {"init_args": {"size": 5, "max_steps": 40}},
    "training.num_envs": 4,
    "training.total_env_steps": 128,
    "training.warmup_env_steps": 64,
    "training.eval_every_env_steps": 64,
    "training.eval_episodes": 2,
    "training.log_every_env_steps": 64,
    "algorithm.hidden_features": [8],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Importing for runs that are none takes seconds, and so does laying figures out."""
    monkeypatch.setattr(processes, "WARM", ())
    monkeypatch.setattr(Drawing, "save", lambda *_: None)


def ended(code):
    """A process that has come to its end."""
    file = os.open(os.devnull, os.O_RDONLY)  # always readable, as the sentinel of one that ended
    return SimpleNamespace(
        exitcode=code,
        sentinel=file,
        is_alive=lambda: False,
        terminate=lambda: None,
        join=lambda: None,
    )


def in_this_process(words, output):
    """Instead of starting a process."""
    cli.run({"recipes.dqn": DQN, "recipes.iqn": IQN}[words[0]], words[1:])
    return ended(0)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes modules that a run can be, and returns its command."""
    monkeypatch.syspath_prepend(tmp_path)

    def command(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return [sys.executable, "-m", name]

    return command


def place(**others):
    known = {"study": "s", "algorithm": "dqn", "task": "t", "method": "m", "judge": ""}
    return {**known, "variant": "", **others}


def test_a_study_is_the_product_of_its_parts_seed_by_seed():
    study = Study(
        algorithms=["dqn", "iqn"],
        methods=["uer", "vlm_rb"],
        judges=["random", "noisy"],
        variants={"1 per 8": {}, "1 per 16": {"training.updates_per_env_step": 0.0625}},
        seeds=2,
        first_seed=5,
        settings={"replay": {"batch_size": 8}, "training.accelerate": "eager"},
    )
    runs = compare.plan(study)
    assert len({run.folder.name for run in runs}) == len(runs) == 2 * 2 * (1 + 2) * 2
    assert [run.place["seed"] for run in runs] == [5] * 12 + [6] * 12
    first, *_, last = runs
    assert first.folder.name == "doorkey_6x6-dqn-uer-1_per_8-s5"  # uniform replay asks no judge
    assert last.folder.name == "doorkey_6x6-iqn-vlm_rb-noisy-1_per_16-s6"
    settings = cli.rehearse(IQN, last.command[3:])
    assert settings.training.updates_per_env_step == 0.0625
    assert settings.training.accelerate == "eager"
    assert settings.replay.batch_size == 8
    assert settings.scoring.scorer.true_positive_rate == 0.8  # noisy's
    assert cli.rehearse(DQN, first.command[3:]).training.updates_per_env_step == 0.125


def test_a_method_is_as_it_was_tuned_for_the_task_and_the_algorithm():
    study = Study(algorithms=["dqn", "iqn"], tasks=["doorkey_8x8"], methods=["per"], seeds=1)
    dqn, iqn = compare.plan(study)
    assert cli.rehearse(DQN, dqn.command[3:]).replay.alpha == 1.0
    assert cli.rehearse(IQN, iqn.command[3:]).replay.alpha == 0.6
    as_it_is = Study(tasks=["doorkey_8x8"], methods=["../methods/per.yaml"], seeds=1)
    (plain,) = compare.plan(as_it_is, compare.CONFIGS / "doorkey_8x8")
    assert cli.rehearse(DQN, plain.command[3:]).replay.batch_size == 64


def test_judges_given_by_their_settings_are_of_the_methods_that_ask_one():
    rates = {"all": {"scoring.scorer.true_positive_rate": 1.0}, "none of it": {}}
    runs = compare.plan(Study(methods=["per", "noisy"], judges=rates, seeds=1))
    assert [run.place["judge"] for run in runs] == ["", "all", "none of it"]
    found = [cli.rehearse(DQN, run.command[3:]).scoring.scorer for run in runs[1:]]
    assert [scorer.true_positive_rate for scorer in found] == [1.0, 0.8]


def test_a_grid_of_settings_is_a_judge_for_each_combination():
    rates = [f"scoring.scorer.{name}_positive_rate" for name in ("true", "false")]
    grid = dict(zip(rates, ([0.5, 1.0], [0.0, 0.2, 0.4]), strict=True))
    late = {"late": {"scoring.delay_env_steps": 9}}
    runs = compare.plan(Study(methods=["per", "noisy"], grid=grid, judges=late, seeds=1))
    judges = [run.place["judge"] for run in runs]
    assert judges[:3] == ["", "late", "true_positive_rate 0.5, false_positive_rate 0.0"]
    found = [cli.rehearse(DQN, run.command[3:]).scoring.scorer for run in runs[2:]]
    assert [(s.true_positive_rate, s.false_positive_rate) for s in found] == [
        *((0.5, 0.0), (0.5, 0.2), (0.5, 0.4), (1.0, 0.0), (1.0, 0.2), (1.0, 0.4))
    ]
    with pytest.raises(ConfigError, match=r"grid is .*name two settings"):
        compare.plan(Study(methods=["noisy"], grid={rates[0]: [0.5]}))


def test_a_finished_run_is_known_by_what_its_settings_say(tmp_path, monkeypatch):
    """Wherever they lie, and whatever else the study has been extended by."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("replay: {class_path: recipes.replay.Uniform}")

    def runs(**others):
        given = {"methods": ["mine.yaml", "per"], "seeds": 1, "out": tmp_path / "out", **others}
        return {run.folder.name: run for run in compare.plan(Study(**given), tmp_path)}

    name = "doorkey_6x6-dqn-mine-s0"
    monkeypatch.setattr(runs_module, "started", in_this_process)
    run = runs(settings=SHORT)[name]
    assert not run.finished()
    run.start()
    assert not run.finished()
    assert run.ended()
    assert run.finished()
    mine.write_text("# another comment\nreplay:\n  class_path: recipes.replay.Uniform\n")
    monkeypatch.setattr(sys, "executable", "another")
    more = runs(settings=SHORT, seeds=3, methods=["uer", "mine.yaml"], tasks=["doorkey_6x6"])
    assert [each for each, run in more.items() if run.finished()] == [name]
    assert not runs(settings={**SHORT, "env.size": 6})[name].finished()
    mine.write_text("replay: {class_path: recipes.replay.Uniform, init_args: {batch_size: 8}}")
    changed = runs(settings=SHORT)
    assert changed[name].replaces_another()
    with pytest.raises(ConfigError, match=f"{name} there are of other settings"):
        execute(list(changed.values()), 1, None, Console())
    assert not changed["doorkey_6x6-dqn-per-s0"].replaces_another()


def test_a_study_trains_reports_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs_module, "started", in_this_process)
    study = tmp_path / "study.yaml"
    settings = {"methods": ["uer", "privileged"], "seeds": 1, "settings": SHORT}
    study.write_text(yaml.safe_dump({"name": "mine", **settings, "out": str(tmp_path)}))
    compare.main([f"--config={study}"])
    assert "privileged" in capsys.readouterr().out
    assert "| uer | 1 | 0." in (tmp_path / "table.md").read_text()
    metrics = tmp_path / "doorkey_6x6-dqn-uer-s0" / "metrics.jsonl"
    assert last_row(metrics.parent)["env_steps"] == 128
    written = metrics.stat().st_mtime_ns
    compare.main([f"--config={study}"])
    assert "2 of 2 runs lie finished" in capsys.readouterr().out
    # A report of what is there names what is not.
    (tmp_path / "table.md").unlink()
    compare.main([f"--config={study}", "--seeds=2", "--report"])
    assert "privileged-s1" in (tmp_path / "table.md").read_text()
    assert metrics.stat().st_mtime_ns == written

    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    methods = [(row["method"], row["env_steps"]) for row in rows]
    assert methods == [("uer", "128"), ("privileged", "128")]
    first = rows[0]
    assert (first["study"], first["task"], first["seed"]) == ("mine", "doorkey_6x6", "0")
    assert first["replay"] == "recipes.replay.Uniform"
    assert "scoring.scorer" not in first  # uniform replay has none
    assert float(first["length"]) > 0
    assert (first["version"], first["torch"]) == (version("vlmrb-torchrl"), version("torch"))
    shared = json.loads((tmp_path / "settings.json").read_text())
    assert shared["training.total_env_steps"] == shared["scoring.clip_transitions"] == 128
    assert not shared.keys() & first.keys()


def test_two_processes_never_write_one_folder(tmp_path):
    """Another comparison in ``out``; a run whose comparison was killed and which lives on."""
    with held(tmp_path), pytest.raises(SystemExit, match=f"{tmp_path} is being written by another"):
        compare.main(["--methods=[uer]", "--seeds=1", f"--out={tmp_path}"])
    run = Run({}, [sys.executable, "-m", "nothing"], tmp_path / "a")
    with held(run.folder):
        figures = run.folder / "metrics.jsonl"
        figures.write_text("{}\n")
        with pytest.raises(ConfigError, match="a is being written by another process"):
            run.start()
        assert figures.read_text() == "{}\n"


def test_run_without_a_checkpoint_is_repeated_by_its_own_comparison_only(tmp_path, modules):
    run = Run(place(), modules("passes", "pass"), tmp_path / "a")

    def passes():
        run.start()
        run.process.join()
        assert run.process.exitcode == 0

    passes()
    left = [run.folder / name for name in ("metrics.jsonl", "events.out.tfevents.1")]
    for path in left:
        path.write_text('{"env_steps": 1, "total_env_steps": 2}\n')
    assert Run(place(), modules("another", "pass"), run.folder).replaces_another()
    assert not run.replaces_another()
    passes()
    assert not any(path.exists() for path in left)


def test_what_a_process_prints_is_added_to_its_file(tmp_path, modules):
    output = tmp_path / "output.txt"
    output.write_text("before\n")
    _, _, *words = modules("speaks", "import sys; print(*sys.argv[1:]); sys.exit('an error')")
    process = processes.started([*words, "and", "after"], output)
    process.join()
    assert process.exitcode == 1
    first, *added = output.read_text().splitlines()
    assert first == "before"
    assert sorted(added) == ["an error", "and after"]  # each stream has a buffer of its own


def test_a_failed_run_leaves_the_others_alone_and_is_tried_again(tmp_path, modules, capsys):
    """What the first run waits for, the second one writes; which the failed one comes before."""
    fails = modules("fails", "raise SystemExit('out of luck')")
    passes = modules("passes", "pass")
    runs = [
        Run(place(method=name), command, tmp_path / name)
        for name, command in (("a", fails), ("b", passes), ("c", passes))
    ]
    execute(runs, 1, None, Console())
    assert [run.finished() for run in runs] == [False, True, True]
    assert "c is finished" in capsys.readouterr().out
    output = tmp_path / "a" / "output.txt"
    assert runs[0].failure == f"a failed: out of luck (whole output: {output})"
    modules("fails", "pass")
    execute([runs[0]], 1, None, Console())
    assert runs[0].finished()


def test_failed_runs_are_named_at_the_end_and_the_tables_are_of_the_others(
    tmp_path, monkeypatch, capsys
):
    def fails_for_per(words, output):
        if "per.yaml" not in " ".join(words):
            return in_this_process(words, output)
        output.write_text("out of luck\n")
        return ended(1)

    monkeypatch.setattr(runs_module, "started", fails_for_per)
    arguments = [f"--settings={json.dumps(SHORT)}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match="1 runs failed: the same command tries them again"):
        compare.main(["--methods=[per, uer]", "--seeds=1", *arguments])
    assert "doorkey_6x6-dqn-per-s0 failed: out of luck" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert "| uer |" in table
    assert "| per |" not in table
    assert "doorkey_6x6-dqn-per-s0" in table


def test_no_run_is_begun_after_the_hours_of_a_study(tmp_path, monkeypatch, modules):
    """Nor does one go on, that is asked to end: here, one that would wait for ever."""
    waits = modules("waits", "import threading; threading.Event().wait()")
    runs = [Run(place(method=name), waits, tmp_path / name) for name in "ab"]
    clock = iter([0.0, 3599.0, 3601.0])
    told = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(runs_module, "time", told)
    execute(runs, 1, 1.0, Console())
    assert runs[0].process.exitcode == -signal.SIGTERM
    assert runs[1].process is None
    assert not any(run.failure or run.finished() for run in runs)


def test_time_left_is_told_by_each_methods_own_speed():
    def run(method, share=0.0, seconds=None):
        return Run(place(method=method), [], Path(), share=share, seconds_per_whole=seconds)

    # a: 60 s a run, b: 20 s; c is not known and taken as 40 s.
    runs = [run("a", 1.0, 60.0), run("b", 0.5, 20.0), run("a"), run("b"), run("c")]
    assert seconds_left(runs, jobs=2) == (10 + 60 + 20 + 40) / 2
    assert seconds_left(runs[2:], jobs=2) is None


@pytest.mark.slow
def test_comparison_that_was_stopped_goes_on_with_a_run_where_it_was(tmp_path, monkeypatch):
    """Stopped as its only run says that it has a checkpoint; then that run is made to end soon."""
    endless = {"training.total_env_steps": 10_000_000, "training.eval_every_env_steps": 0}
    settings = {**SHORT, **endless, "training.checkpoint_every_env_steps": 64}
    study = Study(methods=["uer"], seeds=1, out=tmp_path, settings=settings)
    (run,) = compare.plan(study)

    def saved(*_):
        if any(run.folder.glob("checkpoints/rank0/checkpoint-*")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "show", saved)
        with pytest.raises(KeyboardInterrupt):
            execute([run], 1, None, Console())
    assert run.process.exitcode == 143
    rows = (run.folder / "metrics.jsonl").read_text().splitlines()
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("10000000", "128"))
    (again,) = compare.plan(study)
    execute([again], 1, None, Console())
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
        ("--tasks=[nowhere]", "nowhere"),
        ("--tasks=[]", "tasks is []"),
        ("--tasks=[methods]", "methods"),
        ("--algorithms=[other]", "doorkey_6x6"),
        ("--judges=[uer]", "it should have a section scoring"),
        ("--methods=[per, recipes/configs/doorkey_8x8/dqn/per.yaml]", "give each another name"),
        ("--variants={a b: {}, a-b: {}}", "give each another name"),
        ("--hours=0", "hours is 0"),
        ("--config=nowhere.yaml", "nowhere"),
        ("--report", "no run has finished"),
        ("--methods=[]", "methods is []"),
        ("--settings={training.eval_every_env_steps: 0}", "eval_every_env_steps is 0"),
        ("--settings={env.tile_size: 16}", "vlm_rb-s2: the view of env"),
    ],
)
def test_bad_argument_is_refused_in_one_line(argument, named, tmp_path):
    with pytest.raises(SystemExit) as refusal:
        compare.main([argument, f"--out={tmp_path}"])
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
