"""Ctrl-C and SIGTERM: the step is finished, the run saved, children and shared memory are gone."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from recipes import off_policy
from recipes.dqn import DQN
from recipes.running import cli
from recipes.running.checkpoint import latest
from recipes.running.metrics import read_rows
from tests.recipes.resuming import SHORT, resume

PATIENT = 120
ENDLESS = ["--training.total_env_steps=10000000", "--training.eval_every_env_steps=0"]
JUDGED = ["--env.size=5", "--env.max_steps=40", "--scoring.mode=process"]
JUDGED += [f"--config={cli.CONFIGS / 'methods' / 'privileged.yaml'}"]


def shared_memory():
    """Names and inodes; a semaphore is opened by another name than it has here."""
    with os.scandir("/dev/shm") as entries:
        return {(entry.name, entry.inode()) for entry in entries}


def leaked(before):
    """Shared memory that came since then, and that no process, this run's or another's, holds."""
    new, held = shared_memory() - before, set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            held |= {int(line.split()[4]) for line in maps.read_text().splitlines()}
    return [name for name, inode in new & shared_memory() if inode not in held]


@pytest.fixture
def running(tmp_path):
    """A run with a judge in a process of its own, which has just written a checkpoint."""
    place = [f"--training.log_dir={tmp_path}", "--training.name=run"]
    command = [sys.executable, "-m", "recipes.dqn", *SHORT, *JUDGED, *ENDLESS, *place]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "checkpoint at" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_run_that_is_stopped_is_saved_and_leaves_nothing_behind(number, running, tmp_path):
    before = shared_memory()
    children = psutil.Process(running.pid).children(recursive=True)
    assert children
    running.send_signal(number)
    said, errors = running.communicate(timeout=PATIENT)
    assert running.returncode == 128 + number
    assert f"stopped by {number.name}; go on: python -m recipes.dqn --resume" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=PATIENT)
    assert not alive
    assert not leaked(before)
    saved = int(latest(tmp_path / "run").name[-12:])
    assert f"checkpoint at {saved} env steps" in said.strip().splitlines()[-1]


@pytest.mark.slow
def test_killed_run_leaves_no_process_and_no_shared_memory(running):
    before = shared_memory()
    children = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.communicate(timeout=PATIENT)
    _, alive = psutil.wait_procs(children, timeout=PATIENT)
    assert not alive
    assert not leaked(before)


def test_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    """Both come while the first step is saved, which then never ends."""

    def interrupted(*_):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second")

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(off_policy, "store", interrupted)
    place = [f"--training.log_dir={tmp_path}", "--training.name=run"]
    with pytest.raises(SystemExit) as end:
        cli.run(DQN, [*SHORT, "--env.size=5", "--replay=Uniform", *place])
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_and_then_sigterm_is_one_request(tmp_path, monkeypatch, capsys):
    """As it comes to the runs of a comparison: from the terminal, then from who started them."""
    store = off_policy.store

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        store(*arguments)

    monkeypatch.setattr(off_policy, "store", interrupted)
    place = [f"--training.log_dir={tmp_path}", "--training.name=run"]
    with pytest.raises(SystemExit) as end:
        cli.run(DQN, [*SHORT, "--env.size=5", "--replay=Uniform", *place])
    assert end.value.code == 130
    assert "stopped by SIGINT; go on: " in capsys.readouterr().err
    assert latest(tmp_path / "run").name == "checkpoint-000000000032"
    monkeypatch.undo()
    resume(DQN, tmp_path / "run", "--training.total_env_steps=320")
    rows = [row for row in read_rows(tmp_path / "run") if "speed/env_steps_per_s" in row]
    assert [row["env_steps"] for row in rows] == [128, 256, 320]
