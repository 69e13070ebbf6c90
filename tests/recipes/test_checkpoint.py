"""Checkpoints: whole or not there, the last two kept, refused in one line if not this run's."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict

from recipes.demonstrations import Batches
from recipes.dqn import DQN
from recipes.running import checkpoint, cli
from recipes.running.metrics import CHECKPOINTS, read_rows
from recipes.running.plain import plain, restored
from recipes.sac import SAC
from recipes.settings import Training
from tests.recipes.resuming import SHORT, assert_same_end, resume, start, stopped
from tests.recipes.runs import HOLD, held
from vlmrb_torchrl.checks import ConfigError

LINE = ["--env=tests.recipes.line_task.Line", "--algorithm.hidden_features=[8]", "--replay=Uniform"]
FORGETFUL = ["--env=tests.recipes.line_task.Forgetful", *LINE[1:]]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def names(folder):
    return sorted(path.name for path in (folder / CHECKPOINTS / "rank0").iterdir())


def refused(algorithm, *arguments):
    with pytest.raises(SystemExit) as refusal:
        cli.run(algorithm, [*arguments])
    text = str(refusal.value)
    assert "\n" not in text
    return text


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A run that was stopped after 10 of 32 collections, with checkpoints at 256 and 320 steps."""
    stopped(monkeypatch, SAC, tmp_path / "run", *LINE, after=10)
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["while the file is written", "before it is renamed"])
def test_kill_in_mid_write_leaves_the_last_good_one(place, tmp_path, monkeypatch):
    """In the third: one good checkpoint is older, one is newer."""
    folder, calls = tmp_path / "run", []
    owner, name = {
        "while the file is written": (torch, "save"),
        "before it is renamed": (checkpoint.os, "replace"),
    }[place]
    write = getattr(owner, name)

    def killed(source, target):
        calls.append(target)
        if len(calls) < 5:
            return write(source, target)
        if owner is torch:
            target.write_bytes(b"half of it")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KilledError):
            start(SAC, folder, *LINE)
    left = [name for name in names(folder) if name.startswith("checkpoint-")]
    start(SAC, tmp_path / "whole", *LINE)
    resume(SAC, folder)
    assert left
    assert_same_end(tmp_path / "whole", folder)
    assert names(folder) == ["checkpoint-000000000960", "checkpoint-000000001024"]


def test_last_two_are_kept_and_size_and_time_are_said(unfinished, capsys):
    assert names(unfinished) == ["checkpoint-000000000256", "checkpoint-000000000320"]
    resume(SAC, unfinished)
    assert names(unfinished) == ["checkpoint-000000000960", "checkpoint-000000001024"]
    said = capsys.readouterr().out
    assert "checkpoint at 1024 env steps: 0." in said
    assert "MB, 0." in said


def test_checkpoint_is_json_and_tensors(unfinished):
    files = [path for path in (unfinished / CHECKPOINTS).rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"manifest.json", "state.pt"}
    for path in files:
        if path.name == "state.pt":
            torch.load(path, weights_only=True)
        else:
            json.loads(path.read_text())


def test_command_to_go_on_is_shown(tmp_path, monkeypatch, capsys):
    stopped(monkeypatch, SAC, tmp_path / "run", *LINE, after=1)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"stopped by SIGTERM; go on: python -m recipes.sac --resume {tmp_path}/run"


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
    place = [f"--training.log_dir={tmp_path}", "--training.name=run"]
    text = refused(SAC, *SHORT, *LINE, *place)
    assert f"{folder} holds a run: " in text
    assert "--training.name" in text
    assert f"--resume {folder}" in text
    assert content(folder) == before | {folder / ".lock": b""}


def test_run_that_came_to_nothing_may_be_started_again(tmp_path):
    """As after a judge that does not load."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    checkpoint.check_vacant(tmp_path / "run")


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


def edit_manifests(folder, **changes):
    for path in (folder / CHECKPOINTS).rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["metadata"] |= changes
        path.write_text(json.dumps(manifest))


def test_another_version_is_refused_in_one_line(unfinished):
    edit_manifests(unfinished, vlmrb_torchrl=999)
    text = refused(SAC, f"--resume={unfinished}")
    assert f"has version 999, this code reads {checkpoint.VERSION}: " in text


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--training.seed=5", "training.seed is 5, but"),
        ("--replay.batch_size=32", "replay.init_args.batch_size is 32, but"),
        ("--algorithm.gamma=0.5", "algorithm.gamma is 0.5, but"),
        ("--replay=Prioritized", "replay.class_path is 'recipes.replay.Prioritized', but"),
    ],
)
def test_other_settings_are_refused_in_one_line(argument, named, unfinished):
    text = refused(SAC, f"--resume={unfinished}", argument)
    assert named in text


def test_what_is_not_there_or_damaged_is_refused_in_one_line(unfinished, tmp_path):
    assert "name a run's folder" in refused(SAC, f"--resume={tmp_path / 'nowhere'}")
    newest = max((unfinished / CHECKPOINTS).rglob("state.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    text = refused(SAC, f"--resume={unfinished}")
    assert "checkpoint-000000000320 is damaged" in text
    assert "to go on from the one before" in text
    checkpoint.shutil.rmtree(newest.parents[2])
    resume(SAC, unfinished)
    checkpoint.shutil.rmtree(unfinished / CHECKPOINTS)
    assert "no checkpoint lies there" in refused(SAC, f"--resume={unfinished}")


def test_run_can_be_made_longer(unfinished):
    resume(SAC, unfinished)
    resume(SAC, unfinished, "--training.total_env_steps=1280")
    assert read_rows(unfinished)[-1]["env_steps"] == 1280
    assert torch.load(unfinished / "policy.ckpt", weights_only=True)["env_steps"] == 1280


def test_run_that_diverged_says_where_it_may_go_on_with_another_learning_rate(
    unfinished, monkeypatch
):
    """The loss is no number at 512 steps; the checkpoint before is of 480 or less."""
    drawn = Batches.sample

    def spoilt(self):
        batch = drawn(self)
        if len(self.buffer) >= 512:
            batch["next", "reward"].fill_(torch.nan)  # stored soundly
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "sample", spoilt)
        text = refused(SAC, f"--resume={unfinished}")
    assert "no action and no checkpoint came of it" in text
    assert f"go on from it: python -m recipes.sac --resume {unfinished} --algorithm.learn" in text
    lower = "--algorithm.learning_rate=1e-5"
    resume(SAC, unfinished, lower)
    (file,) = max((unfinished / CHECKPOINTS).glob("rank0/*")).rglob("state.pt")
    (group,) = torch.load(file, weights_only=True)["optimizers"]["critic"]["param_groups"]
    assert group["lr"] == 1e-5


def say_that_the_disk_is_full(state, path):
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def write_up_to_a_limit_of_the_kernel(state, path, save=torch.save):
    """Less than a checkpoint takes; what TensorBoard's thread writes meanwhile fits in."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, unlimited[1]))
    try:
        save(state, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("full", [say_that_the_disk_is_full, write_up_to_a_limit_of_the_kernel])
def test_full_disk_does_not_end_the_run_and_leaves_the_last_good_one(
    full, tmp_path, monkeypatch, capsys
):
    folder, save, saved = tmp_path / "run", torch.save, []

    def write(state, path):
        saved.append(path)
        (full if len(saved) > 5 and isinstance(path, Path) else save)(state, path)

    monkeypatch.setattr(torch, "save", write)
    start(SAC, folder, *LINE, "--training.checkpoint_every_env_steps=128")
    said = capsys.readouterr().out
    assert "no checkpoint at 768 env steps: " in said
    if full is say_that_the_disk_is_full:
        assert "[Errno 28] No space left on device" in said
    assert names(folder) == ["checkpoint-000000000512", "checkpoint-000000000640"]
    assert (folder / "metrics.jsonl").exists()


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
    small_disk, tmp_path, monkeypatch, capsys
):
    """Full from the sixth checkpoint on, it can write neither that nor the next figures."""
    arguments = (*LINE, "--training.checkpoint_every_env_steps=128")
    start(SAC, tmp_path / "whole", *arguments)
    folder, save, saved = small_disk / "run", torch.save, []

    def write(state, path):
        if isinstance(path, Path):
            saved.append(path)
            if len(saved) == 6:
                fill(small_disk)
        return save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write)
        with pytest.raises(SystemExit) as end:
            start(SAC, folder, *arguments)
    text = str(end.value)
    assert "\n" not in text
    assert "No space left on device" in text
    assert f"python -m recipes.sac --resume {folder}" in text
    assert "no checkpoint at 768 env steps: " in capsys.readouterr().out
    assert names(folder) == ["checkpoint-000000000512", "checkpoint-000000000640"]
    (small_disk / "ballast").unlink()
    resume(SAC, folder)
    assert_same_end(folder, tmp_path / "whole")


def test_without_checkpoints_none_is_written(tmp_path, monkeypatch, capsys):
    none = "--training.checkpoint_every_env_steps=0"
    stopped(monkeypatch, SAC, tmp_path / "run", *LINE, none, after=2)
    assert not (tmp_path / "run" / CHECKPOINTS).exists()
    assert "stopped by SIGTERM; not saved" in capsys.readouterr().err


def test_tensorboard_shows_each_point_once(unfinished, monkeypatch):
    """Killed after points of 512 steps were written, from the checkpoint before them."""
    stopped(monkeypatch, SAC, unfinished, after=5, by=resume)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_save", lambda *_: False)
        stopped(monkeypatch, SAC, unfinished, after=10, by=resume)
    assert read_rows(unfinished)[-1]["env_steps"] == 768
    resume(SAC, unfinished)
    events = EventAccumulator(str(unfinished)).Reload()
    for tag, expected in (("loss/critic", [256, 512, 768, 1024]), ("eval/return", [512, 1024])):
        assert [point.step for point in events.Scalars(tag)] == expected


def test_gymnasium_env_begins_new_episodes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mujoco")
    pendulum = ["--env=tests.recipes.gymnasium_task.Gymnasium", *LINE[1:]]
    stopped(monkeypatch, SAC, tmp_path / "run", *pendulum, after=10)
    resume(SAC, tmp_path / "run")
    assert "SerialEnv cannot be put back into the middle" in capsys.readouterr().out
    assert read_rows(tmp_path / "run")[-1]["env_steps"] == 1024


def test_env_that_cannot_be_put_back_begins_new_episodes_and_says_so_once(
    tmp_path, monkeypatch, capsys
):
    """Its episodes take 11 to 20 steps, those after the resume included."""
    stopped(monkeypatch, SAC, tmp_path / "run", *FORGETFUL, after=10)
    capsys.readouterr()
    resume(SAC, tmp_path / "run", "--training.log_every_env_steps=256")
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
    assert Training().checkpoint_every_env_steps > 0


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
