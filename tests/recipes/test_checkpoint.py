"""Checkpoints: whole or not there, the last two kept, refused in one line if not this run's."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensordict import TensorDict

from recipes.demonstrations import Batches
from recipes.dqn import DQN
from recipes.running import checkpoint, cli
from recipes.running.checkpoint import CHECKPOINTS
from recipes.running.metrics import read_rows
from recipes.running.run_state import plain, restored
from recipes.sac import SAC
from tests.recipes.resuming import SHORT, assert_same_end, resume, start, stopped
from tests.recipes.runs import HOLD, held
from vlmrb_torchrl.checks import ConfigError

LINE = ["--env=tests.recipes.line_task.Line", "--algorithm.hidden_features=[8]", "--replay=Uniform"]
FORGETFUL = ["--env=tests.recipes.line_task.Forgetful", *LINE[1:]]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def names(folder):
    return sorted(path.name for path in (folder / CHECKPOINTS / "rank0").iterdir())


def checkpoints(*env_steps):
    return [f"checkpoint-{steps:012d}" for steps in env_steps]


def refused(algorithm, *arguments):
    with pytest.raises(SystemExit) as refusal:
        cli.run(algorithm, [*arguments])
    text = str(refusal.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 512 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(SAC, folder, *LINE)
    return folder


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stopped(pytest.MonkeyPatch(), SAC, folder, *LINE, after=6)
    return folder


@pytest.fixture
def unfinished(stopped_run, tmp_path):
    """A run that was stopped after 6 of 16 collections, with checkpoints at 128 and 192 steps."""
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.mark.parametrize("place", ["while the file is written", "before it is renamed"])
def test_kill_in_mid_write_leaves_the_last_good_one(place, whole, tmp_path, monkeypatch):
    """In the third: one good checkpoint is older, one is newer."""
    folder, calls = tmp_path / "run", []
    owner, name = {
        "while the file is written": (torch, "save"),
        "before it is renamed": (os, "replace"),
    }[place]
    write = getattr(owner, name)

    def killed(source, target):
        if owner is torch or ".stage-" in str(source):
            calls.append(target)
        if len(calls) < 3:
            return write(source, target)
        if owner is torch:
            target.write_bytes(b"half of it")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KilledError):
            start(SAC, folder, *LINE)
    left = [name for name in names(folder) if name.startswith("checkpoint-")]
    assert left == checkpoints(64, 128)
    resume(SAC, folder)
    assert_same_end(whole, folder)
    assert names(folder) == checkpoints(448, 512)


def test_last_two_are_kept_of_json_and_tensors_and_size_and_time_are_said(unfinished, capsys):
    assert names(unfinished) == checkpoints(128, 192)
    resume(SAC, unfinished)
    assert names(unfinished) == checkpoints(448, 512)
    said = capsys.readouterr().out
    assert "checkpoint at 512 env steps: 0." in said
    assert "MB, 0." in said
    files = [path for path in (unfinished / CHECKPOINTS).rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"manifest.json", "state.pt"}
    for path in files:
        if path.name == "state.pt":
            torch.load(path, weights_only=True)
        else:
            json.loads(path.read_text())


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["checkpoints", "policy.ckpt", "metrics.jsonl"])
def test_fresh_start_leaves_what_a_run_has_left_alone_and_names_two_ways_out(left, tmp_path):
    folder = tmp_path / "run"
    if left == "checkpoints":
        (folder / CHECKPOINTS / "rank0" / "checkpoint-000000000064").mkdir(parents=True)
    else:
        folder.mkdir()
        (folder / left).write_text("of a run")
    before = content(folder)
    text = refused(SAC, *SHORT, *LINE, f"--training.log_dir={tmp_path}", "--training.name=run")
    assert f"{folder} holds a run: " in text
    assert "--training.name" in text
    assert f"--resume {folder}" in text
    assert content(folder) == before | {folder / ".lock": b""}


def test_run_that_came_to_nothing_may_be_started_again(tmp_path):
    """As after a judge that does not load."""
    (tmp_path / "metrics.jsonl").touch()
    checkpoint.check_vacant(tmp_path)


@pytest.mark.parametrize("by", ["a fresh start", "--resume"])
def test_second_start_of_a_run_is_refused_until_the_first_has_ended_or_was_killed(
    by, unfinished, tmp_path
):
    folder = unfinished if by == "--resume" else tmp_path / "fresh"
    begin = resume if by == "--resume" else start
    with held(folder):
        before = content(folder)
        with pytest.raises(SystemExit) as refusal:
            begin(SAC, folder, *([] if by == "--resume" else LINE))
        assert str(refusal.value).startswith(f"{folder} is being written by another process: ")
        assert "\n" not in str(refusal.value)
        assert content(folder) == before
    with checkpoint.locked(folder):
        pass


def test_lock_keeps_others_out_and_is_not_inherited(tmp_path):
    """A judge's process may outlive a run that was killed, by a moment."""
    waiting, woken = os.pipe()
    with checkpoint.locked(tmp_path):
        child = os.fork()
        if not child:
            os.close(woken)
            os.read(waiting, 1)
            os._exit(0)
        ask = [sys.executable, "-c", HOLD.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB")]
        ask.append(str(tmp_path / ".lock"))
        assert subprocess.run(ask, input=b"", capture_output=True, check=False).returncode == 1
    assert subprocess.run(ask, input=b"", capture_output=True, check=False).returncode == 0
    os.close(woken)
    os.close(waiting)
    os.waitpid(child, 0)


def test_another_run_s_settings_or_version_are_refused_in_one_line(unfinished):
    resumed = f"--resume={unfinished}"
    assert "training.seed is 5, but" in refused(SAC, resumed, "--training.seed=5")
    named = "replay.class_path is 'recipes.replay.Prioritized', but"
    assert named in refused(SAC, resumed, "--replay=Prioritized")
    for path in (unfinished / CHECKPOINTS).rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["metadata"]["vlmrb_torchrl"] = 999
        path.write_text(json.dumps(manifest))
    text = refused(SAC, resumed)
    assert f"has version 999, this code reads {checkpoint.VERSION}: " in text


def test_what_is_not_there_or_damaged_is_refused_in_one_line(unfinished, tmp_path):
    assert "name a run's folder" in refused(SAC, f"--resume={tmp_path / 'nowhere'}")
    newest = max((unfinished / CHECKPOINTS).rglob("state.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    text = refused(SAC, f"--resume={unfinished}")
    assert "checkpoint-000000000192 is damaged" in text
    assert "to go on from the one before" in text
    shutil.rmtree(newest.parents[2])
    resume(SAC, unfinished)
    shutil.rmtree(unfinished / CHECKPOINTS)
    assert "no checkpoint lies there" in refused(SAC, f"--resume={unfinished}")


def test_run_can_be_made_longer(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    resume(SAC, folder, "--training.total_env_steps=640")
    assert read_rows(folder)[-1]["env_steps"] == 640
    assert torch.load(folder / "policy.ckpt", weights_only=True)["env_steps"] == 640


def test_run_that_diverged_says_where_it_may_go_on_with_another_learning_rate(
    unfinished, monkeypatch
):
    """The loss is no number at 288 steps; the checkpoint before is of 256 or less."""
    drawn = Batches.sample

    def spoilt(self):
        batch = drawn(self)
        if len(self.buffer) >= 288:
            batch["next", "reward"].fill_(torch.nan)  # stored soundly
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "sample", spoilt)
        text = refused(SAC, f"--resume={unfinished}")
    assert "no action and no checkpoint came of it" in text
    assert f"go on from it: python -m recipes.sac --resume {unfinished} --algorithm.learn" in text
    resume(SAC, unfinished, "--algorithm.learning_rate=1e-5")
    (file,) = max((unfinished / CHECKPOINTS).glob("rank0/*")).rglob("state.pt")
    optimizers = torch.load(file, weights_only=True)["algorithm"]["optimizers"]
    assert optimizers["critic"]["param_groups"][0]["lr"] == 1e-5


def test_disk_that_is_full_for_a_checkpoint_does_not_end_the_run_and_leaves_the_last_good_one(
    unfinished, monkeypatch, capsys
):
    """The kernel writes less than a checkpoint takes; TensorBoard's thread fits in meanwhile."""
    save, saved = torch.save, []

    def write(state, path):
        saved.append(path)
        if len(saved) == 1 or not isinstance(path, Path):
            return save(state, path)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, unlimited[1]))
        try:
            return save(state, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(torch, "save", write)
    resume(SAC, unfinished)
    assert "no checkpoint at 320 env steps: " in capsys.readouterr().out
    assert names(unfinished) == checkpoints(192, 256)
    assert read_rows(unfinished)[-1]["env_steps"] == 512


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk):
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(512))


def test_run_whose_disk_is_full_stops_in_one_line_and_resumes_when_there_is_room(
    small_disk, whole, tmp_path, monkeypatch, capsys
):
    """Full from the third checkpoint on, it can write neither that nor the next figures."""
    folder, save, saved = small_disk / "run", torch.save, []

    def write(state, path):
        if isinstance(path, Path):
            saved.append(path)
            if len(saved) == 3:
                fill(small_disk)
        return save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write)
        with pytest.raises(SystemExit) as end:
            start(SAC, folder, *LINE)
    text = str(end.value)
    assert "\n" not in text
    assert "No space left on device" in text
    assert f"python -m recipes.sac --resume {folder}" in text
    assert "no checkpoint at 192 env steps: " in capsys.readouterr().out
    assert names(folder) == checkpoints(64, 128)
    (small_disk / "ballast").unlink()
    resume(SAC, folder)
    assert_same_end(folder, whole)


def test_without_checkpoints_none_is_written(tmp_path, monkeypatch, capsys):
    none = "--training.checkpoint_every_env_steps=0"
    stopped(monkeypatch, SAC, tmp_path / "run", *LINE, none, after=2)
    assert not (tmp_path / "run" / CHECKPOINTS).exists()
    assert "stopped by SIGTERM; not saved" in capsys.readouterr().err


def test_tensorboard_shows_each_point_once(unfinished, monkeypatch):
    """Killed after points of 256 and 384 steps were written, from the checkpoint before them."""
    # Files of one second are read in the order of the names of their numbers: 9 after 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_save", lambda *_: False)
        stopped(monkeypatch, SAC, unfinished, after=6, by=resume)
    assert read_rows(unfinished)[-1]["env_steps"] == 384
    resume(SAC, unfinished)
    events = EventAccumulator(str(unfinished)).Reload()
    for tag, expected in (("loss/critic", [128, 256, 384, 512]), ("eval/return", [256, 512])):
        assert [point.step for point in events.Scalars(tag)] == expected


def test_gymnasium_env_begins_new_episodes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mujoco")
    pendulum = ["--env=tests.recipes.gymnasium_task.Gymnasium", *LINE[1:]]
    short = ["--training.total_env_steps=128", "--training.eval_every_env_steps=0"]
    stopped(monkeypatch, SAC, tmp_path / "run", *pendulum, *short, after=2)
    resume(SAC, tmp_path / "run")
    assert "SerialEnv cannot be put back into the middle" in capsys.readouterr().out
    assert read_rows(tmp_path / "run")[-1]["env_steps"] == 128


def test_env_that_cannot_be_put_back_begins_new_episodes_and_says_so_once(
    tmp_path, monkeypatch, capsys
):
    """Its episodes take 11 to 20 steps, those after the resume included."""
    stopped(monkeypatch, SAC, tmp_path / "run", *FORGETFUL, after=6)
    capsys.readouterr()
    resume(SAC, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("ForgetfulEnv cannot be put back into the middle of its episodes") == 1
    lengths = [r["train/episode_length"] for r in read_rows(tmp_path / "run") if "loss/critic" in r]
    assert len(lengths) == 4
    assert all(1 <= length <= 20 for length in lengths)


def test_state_that_a_checkpoint_cannot_hold_is_refused_before_the_first_step(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(DQN, "counts", ("learning_rate", "transitions"), raising=False)
    with pytest.raises(SystemExit, match=r"algorithm\.counts\.transitions is a Tr.*") as refusal:
        start(DQN, tmp_path / "run", "--replay=Uniform")
    assert "\n" not in str(refusal.value)


def test_plain_states_are_restored_exactly():
    state = {
        "td": TensorDict({"a": torch.arange(3), "b": {"c": torch.ones(3, 2)}}, [3]),
        "many": [1, (2.5, None, "x"), b"y"],
        "dtype": torch.float64,
    }
    again = restored(plain(state, "state"))
    assert (again["td"] == state["td"]).all()
    assert again["td"].batch_size == state["td"].batch_size
    assert again["many"] == state["many"]
    with pytest.raises(ConfigError, match=r"state\.many\.1 is a function"):
        plain({"many": [1, lambda: 0]}, "state")
