"""Checkpoints of a run: written whole or not at all, the last two kept, refused if not this run's.

One is a folder in the format of ``torchrl.checkpoint``: a manifest in JSON, and a file of tensors
and numbers that ``torch.load`` reads with ``weights_only=True``, so that no code is in it. Each
rank has its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    StateDictCheckpointAdapter,
)

from recipes.running.interruption import Interruption, StoppedError
from recipes.running.metrics import METRICS_FILE, Telemetry
from recipes.running.run_state import RunState
from vlmrb_torchrl.checks import ConfigError, one_line

CHECKPOINTS = "checkpoints"
"""Folder in the run's."""
VERSION = 5
"""Of the state's layout; one of another version is refused."""
_KEPT = 2
_FREE = {
    "algorithm.learning_rate",
    "algorithm.gradient_clip_norm",
    "training.total_env_steps",
    "training.checkpoint_every_env_steps",
    "training.policies_every_env_steps",
    "training.log_dir",
    "training.name",
    "training.progress",
    "training.torch_threads",
    "scoring.timeout_s",
}
"""Settings that a resumed run may change."""

Config = Mapping[str, Any]


class Checkpoints:
    """The checkpoints in a run's folder; by ``resume`` the run is to go on from the last one.

    Once its ``interruption`` is entered, a signal makes the next `after_step` the last.

    Raises:
        ConfigError: There is none to go on from, or it is one of another number of ranks.
    """

    def __init__(
        self, fabric: Fabric, folder: Path, every_env_steps: int, config: Config, *, resume: bool
    ) -> None:
        self._fabric, self._every, self._config = fabric, every_env_steps, config
        self._folder = folder / CHECKPOINTS / f"rank{fabric.global_rank}"
        self._from = self._folder / latest(folder, fabric.world_size).name if resume else None
        self._last = 0  # env steps of the last
        self.interruption = Interruption(fabric)
        for leftover in self._folder.glob(".*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover)

    def restore(self, run: RunState) -> bool:
        """Load the last checkpoint, if the run is to go on from it, and say whether it is.

        Raises:
            ConfigError: It cannot be read, or a part of the run cannot be saved at all.
        """
        if self._every:
            run.state_dict()  # what cannot be saved is refused now, not after hours
        if self._from is None:
            return False
        try:
            _registered(run).load(self._from, map_location="cpu")
        except CheckpointError as error:
            raise ConfigError(
                f"{self._from} is damaged ({one_line(error)}): remove it, on every rank, to go on "
                "from the one before"
            ) from error
        self._last = run.env_steps
        return True

    def after_step(self, run: RunState, telemetry: Telemetry) -> None:
        """Write a checkpoint if it is time for one, or if the run is to end here.

        Raises:
            StoppedError: A signal asked the run, on any rank, to end.
        """
        stop, saved = self.interruption.requested(), False
        if self._every and (stop or run.env_steps // self._every > self._last // self._every):
            with telemetry.paused():
                saved = self._save(run, telemetry)
            self._last = run.env_steps
        if stop:
            raise StoppedError(stop, saved)

    def _save(self, run: RunState, telemetry: Telemetry) -> bool:
        """Write a checkpoint and remove the oldest; return whether that went well.

        A disk that is full or gone does not end the run: what was written before stays.
        """
        begun = time.perf_counter()
        done = self._folder / f"checkpoint-{run.env_steps:012d}"  # as CheckpointRotation names it
        shown = f"checkpoint at {run.env_steps} env steps"
        identity = {
            "vlmrb_torchrl": VERSION,
            "env_steps": run.env_steps,
            "world_size": self._fabric.world_size,
            "config": self._config,
        }
        try:
            _registered(run).save(done, metadata=identity)  # under another name, then renamed
            inside = list(done.rglob("*"))
            for path in (*inside, done, self._folder):
                _sync(path)
            size = sum(path.stat().st_size for path in inside if path.is_file())
            telemetry.say(f"{shown}: {size / 1e6:.1f} MB, {time.perf_counter() - begun:.2f} s")
            written = True
        except (OSError, RuntimeError) as error:
            telemetry.say(f"no {shown}: {one_line(error)}")
            written = False
        flag = torch.tensor(float(written), device=self._fabric.device)
        if not self._fabric.all_gather(flag).min():  # type: ignore[union-attr]
            shutil.rmtree(done, ignore_errors=True)  # one that a rank lacks is none
            return False
        CheckpointRotation(self._folder, keep_last=_KEPT).prune()
        return True


def _registered(run: RunState) -> Checkpoint:
    # "torch": one file, whose writing fails by an error if the disk is full. Memory-mapped files,
    # the default, would end the process.
    return Checkpoint().register("run", run, adapter=StateDictCheckpointAdapter("torch"))


def _sync(path: Path) -> None:
    """Bring a file, or the list of a folder's files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(folder: Path, world_size: int | None = None) -> Path:
    """The last checkpoint that every rank has, rank 0's; of ``world_size`` ranks, if given."""
    ranks = sorted((folder / CHECKPOINTS).glob("rank*"))
    whole = [CheckpointRotation(rank, keep_last=_KEPT).checkpoints() for rank in ranks]
    names = [{path.name for path in paths} for paths in whole]
    common: set[str] = set.intersection(*names) if names else set()
    if not common:
        raise ConfigError(f"--resume {folder}: no checkpoint lies there, start another run")
    if world_size and world_size != len(ranks):
        raise ConfigError(
            f"--resume {folder}: it was run by {len(ranks)} processes, and these are {world_size}"
        )
    return ranks[0] / max(common)


def last_good(folder: Path, again: str) -> str:
    """Say which checkpoint a run that failed leaves behind, and how to go on from it."""
    try:
        return f"the last good checkpoint is {latest(folder)} (go on from it: {again})"
    except ConfigError:
        return "no checkpoint was written yet"


def check_resumable(folder: Path, config: Config) -> None:
    """Refuse to go on from the checkpoints of another run, or of another version of this code."""
    path = latest(folder)
    saved = Checkpoint.manifest(path)["metadata"]
    version = saved.get("vlmrb_torchrl")
    if version != VERSION:
        raise ConfigError(
            f"{path} has version {version}, this code reads {VERSION}: go on with the code that "
            "wrote it, or start the run anew"
        )
    before, now = flat(saved["config"]), flat(config)
    for name in sorted((before.keys() | now.keys()) - _FREE):
        was, is_now = before.get(name), now.get(name)
        if was != is_now:
            raise ConfigError(
                f"{name} is {is_now!r}, but {folder} was run with {was!r}: leave it, or start a "
                "run of another name"
            )


def flat(config: Config, prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names, such as ``training.seed``."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        whole = f"{prefix}{name}"
        settings |= flat(value, f"{whole}.") if isinstance(value, Mapping) else {whole: value}
    return settings


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep ``folder``, made if need be, from every other process that asks for it.

    The kernel ends it with the process, however that ends; children do not inherit it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"{folder} is being written by another process: wait for its end, or give "
                    "this one another name (fabric run trains one run on several devices)"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS):  # a file system without locks
                raise
        yield


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has left a checkpoint, on some rank, in ``folder``."""
    return any((folder / CHECKPOINTS).glob("*/checkpoint-*"))


def has_results(folder: Path) -> bool:
    """Whether a run has left figures, a checkpoint or a policy in ``folder``."""
    metrics = folder / METRICS_FILE
    left = (folder / "policy.ckpt").exists() or has_checkpoint(folder)
    return left or (metrics.exists() and metrics.stat().st_size > 0)


def check_vacant(folder: Path) -> None:
    """Refuse to begin a run where one has left results."""
    if has_results(folder):
        raise ConfigError(
            f"{folder} holds a run: give this one another --training.name, go on with that one by "
            f"--resume {folder}, or remove it"
        )
