"""Where a run's figures go: TensorBoard, a metrics file, a progress bar."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensordict import TensorDictBase
from torch import Tensor
from torchrl import timeit

from recipes.replay import Replay
from recipes.running.metrics import METRICS_FILE
from recipes.running.strips import clip_strip
from recipes.settings import Training
from recipes.tasks import Task
from vlmrb_torchrl import AsyncScorer, VLMReplayBuffer, keys


class Telemetry:
    """Collects the figures of a run and writes a row of means every so often.

    ``metrics.jsonl`` holds one JSON object per row: ``env_steps``, ``total_env_steps``,
    ``seconds`` of training (evaluations left out) and the figures under the names that
    TensorBoard shows; ``time/...`` are shares of the seconds between two rows, on CUDA of the
    learner's thread, which does not wait for the kernels. Only rank 0 writes.

    Args:
        fabric: A launched Fabric.
        task: For what counts as success.
        training: Distances of rows and pictures.
        folder: Folder of the run.
        resumed: Whether a state will be loaded: what was written before then stays.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        training: Training,
        folder: Path,
        *,
        resumed: bool = False,
    ) -> None:
        self._writes = fabric.is_global_zero
        self._training = training
        self.folder = folder
        self._task = task
        self._sums: dict[str, tuple[Tensor, int]] = {}  # of figures, and how many they are
        self._least_weight: Tensor | None = None
        self._batch: TensorDictBase | None = None  # of the round's last update
        self._episode_return: Tensor | None = None
        self._episode_length: Tensor | None = None
        self._episode_success: Tensor | None = None
        self._episodes = 0
        self._updates = 0
        self._drawn: list[Tensor] = []  # slots drawn since the last row
        self._next_log = training.log_every_env_steps
        self._next_strip = training.strip_every_env_steps
        self._latest: dict[str, float] = {}
        self._progress: Progress | None = None
        self._resumed = resumed
        self._last_point = 0  # env steps of the last row or picture

    def __enter__(self) -> Telemetry:
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / METRICS_FILE).open("a" if self._resumed else "w")
            self._tensorboard = self._open_tensorboard()
            if self._training.progress:
                self._progress = Progress(
                    TextColumn("[bold]{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                )
                self._progress.start()
                self._bar = self._progress.add_task(
                    self.folder.name, total=self._training.total_env_steps, note=""
                )
        timeit.erase()
        self._start = self._last_time = time.perf_counter()
        self._last_env_steps = 0
        return self

    def _open_tensorboard(self, **options: int) -> TensorBoardLogger:
        return TensorBoardLogger(self.folder.parent, name=self.folder.name, version="", **options)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the training time."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._start += elapsed
        self._last_time += elapsed

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writes:
            if self._progress is not None:
                self._progress.stop()
            self._file.close()
            self._tensorboard.finalize("success" if error is None else "failed")

    def _add(self, name: str, values: Tensor) -> None:
        """Add figures to a mean; nothing is read back from the device."""
        total, number = values.detach().sum(), values.numel()
        if name in self._sums:
            total, number = total + self._sums[name][0], number + self._sums[name][1]
        self._sums[name] = total, number

    def stepped(self, optimizer: str, loss: Tensor, gradient_norm: Tensor) -> None:
        """Note a gradient step."""
        self._add(f"loss/{optimizer}", loss)
        self._add(f"gradient_norm/{optimizer}", gradient_norm)

    @property
    def learning(self) -> dict[str, Tensor]:
        """Losses and gradients' norms since the last row, summed."""
        kinds = ("loss/", "gradient_norm/")
        return {name: total for name, (total, _) in self._sums.items() if name.startswith(kinds)}

    def updated(
        self, batch: TensorDictBase, replayed: TensorDictBase, buffer: VLMReplayBuffer
    ) -> None:
        """Note an update, after all its gradient steps.

        Args:
            batch: What was learnt from.
            replayed: The part of it that was drawn from the buffer.
            buffer: The buffer, whose newest transition is 0 transitions old.
        """
        self._batch = batch
        self._updates += 1
        self._add("value/td_error", batch[keys.TD_ERROR])
        index = replayed[keys.INDEX]
        self._drawn.append(index)
        self._add(
            "replay/age_transitions",
            (buffer.writer._cursor - 1 - index) % buffer.storage.max_size,
        )
        weights = replayed.get(keys.WEIGHT, None)
        if weights is not None:
            least = weights.min()
            known = self._least_weight
            self._least_weight = least if known is None else torch.minimum(known.to(least), least)

    def note(self, figures: dict[str, float]) -> None:
        """Keep figures of the training loop, such as ε, for the next row."""
        self._latest |= {f"train/{name}": value for name, value in figures.items()}

    def collected(self, data: TensorDictBase) -> None:
        """Note the finished episodes of a collected batch ``[N, T]``."""
        reward = data["next", "reward"].squeeze(-1)
        done = data["next", "done"].squeeze(-1)
        success = self._task.success(data["next"])
        if self._episode_return is None or self._episode_length is None:
            self._episode_return = torch.zeros_like(reward[:, 0])
            self._episode_length = torch.zeros_like(reward[:, 0])
        if self._episode_success is None and success is not None:
            self._episode_success = torch.zeros_like(success[:, 0])
        for step in range(reward.shape[1]):
            self._episode_return += reward[:, step]
            self._episode_length += 1
            if self._episode_success is not None and success is not None:
                self._episode_success |= success[:, step]
            if done[:, step].any():
                ended = done[:, step]
                if self._episode_success is not None:
                    self._add("train/success", self._episode_success[ended])
                    self._episode_success[ended] = False
                self._add("train/return", self._episode_return[ended])
                self._add("train/episode_length", self._episode_length[ended])
                self._episodes += int(ended.sum())
                self._episode_return[ended] = 0
                self._episode_length[ended] = 0

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        elif self._writes:
            print(text, flush=True)

    def log(
        self,
        env_steps: int,
        algorithm: Any,
        replay: Replay,
        buffer: VLMReplayBuffer,
        scoring: AsyncScorer | None,
    ) -> None:
        """Write a row if it is time for one; only then is the algorithm asked for its figures.

        The end of a run always is.
        """
        batch, self._batch = self._batch, None
        if self._progress is not None:
            self._progress.update(self._bar, completed=env_steps)
        if env_steps < min(self._next_log, self._training.total_env_steps):
            return
        self._next_log += self._training.log_every_env_steps
        now = time.perf_counter()
        seconds = now - self._last_time
        row = {name: float(total) / number for name, (total, number) in self._sums.items()}
        if batch is not None:
            figures = algorithm.figures(batch)
            self._latest |= {name: float(figure) for name, figure in figures.items()}
        row |= self._latest
        row["speed/env_steps_per_s"] = (env_steps - self._last_env_steps) / seconds
        row["speed/updates_per_s"] = self._updates / seconds
        spent = timeit.todict(percall=False, prefix="time")
        row |= {name: total / seconds for name, total in spent.items()}
        timeit.erase()
        row["train/episodes"] = self._episodes
        drawn = torch.cat(self._drawn) if self._drawn else None
        replayed = replay.figures(buffer, drawn)
        row |= {f"replay/{name}": figure for name, figure in replayed.items()}
        if self._least_weight is not None:
            row["replay/least_weight"] = float(self._least_weight)
        if scoring is not None:
            row |= {f"scoring/{name}": value for name, value in scoring.statistics().items()}
        self._write(env_steps, row)
        self._sums.clear()
        self._drawn.clear()
        self._least_weight = None
        self._updates = 0
        self._last_time, self._last_env_steps = now, env_steps
        if scoring is not None and 0 < self._next_strip <= env_steps:
            self._next_strip += self._training.strip_every_env_steps
            self._show_clips(env_steps, scoring)

    def evaluated(self, env_steps: int, result: dict[str, float]) -> None:
        """Write the figures of an evaluation."""
        self._write(env_steps, {f"eval/{name}": value for name, value in result.items()})
        if self._progress is not None:
            measure = "success" if "success" in result else "return"
            self._progress.update(self._bar, note=f"{measure} {result[measure]:.2f}")

    def _show_clips(self, env_steps: int, scoring: AsyncScorer) -> None:
        for name, (frames, score) in scoring.showcase().items():
            if self._writes:
                figure = clip_strip(frames, f"{name} clip, score {score:.3f}")
                self._tensorboard.experiment.add_figure(f"clips/{name}", figure, env_steps)

    def _write(self, env_steps: int, row: dict[str, float]) -> None:
        if not self._writes:
            return
        self._last_point = env_steps
        seconds = time.perf_counter() - self._start
        place = {"env_steps": env_steps, "total_env_steps": self._training.total_env_steps}
        self._file.write(json.dumps({**place, "seconds": seconds, **row}) + "\n")
        self._file.flush()
        self._tensorboard.log_metrics(row, env_steps)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What the next rows depend on, and how much of the metrics file there is."""
        now, written = time.perf_counter(), 0
        if self._writes:
            os.fsync(self._file.fileno())
            written = self._file.tell()
        return {
            "sums": {name: (total.cpu(), n) for name, (total, n) in self._sums.items()},
            "least_weight": None if self._least_weight is None else self._least_weight.cpu(),
            "drawn": torch.cat(self._drawn).cpu() if self._drawn else None,
            "latest": dict(self._latest),
            "episodes": (self._episodes, self._episode_return, self._episode_length),
            "episode_success": self._episode_success,
            "updates": self._updates,
            "env_steps": self._last_env_steps,
            "next": (self._next_log, self._next_strip),
            "seconds": (now - self._start, now - self._last_time),
            "written": written,
            "last_point": self._last_point,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; rows and points that came after it are forgotten."""
        now = time.perf_counter()
        self._sums, self._least_weight = dict(state["sums"]), state["least_weight"]
        self._drawn = [] if state["drawn"] is None else [state["drawn"]]
        self._latest = dict(state["latest"])
        self._episodes, self._episode_return, self._episode_length = state["episodes"]
        self._episode_success = state["episode_success"]
        self._updates, self._last_env_steps = state["updates"], state["env_steps"]
        self._next_log, self._next_strip = state["next"]
        self._start, self._last_time = (now - seconds for seconds in state["seconds"])
        if self._writes:
            self._file.truncate(state["written"])
            self._file.seek(0, os.SEEK_END)
            self._last_point = state["last_point"]
            self._tensorboard = self._open_tensorboard(purge_step=self._last_point + 1)

    def episodes_restarted(self) -> None:
        """Forget the episodes in progress."""
        self._episode_return = self._episode_length = self._episode_success = None
