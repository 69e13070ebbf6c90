"""Where a run's figures go: TensorBoard, a metrics file, a progress bar."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
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

from recipes.metrics import METRICS_FILE
from recipes.settings import Training
from recipes.strips import clip_strip
from recipes.tasks import Task
from vlmrb_torchrl import AsyncScorer, VLMPrioritizedSampler, VLMReplayBuffer, keys


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
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
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

    def stepped(self, optimizer: str, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Note a gradient step; nothing is read back from the device here."""
        self._sums[f"loss/{optimizer}"].append(loss.detach())
        if gradient_norm is not None:
            self._sums[f"gradient_norm/{optimizer}"].append(gradient_norm)

    def updated(self, batch: TensorDictBase) -> None:
        """Note the batch of an update, after all its gradient steps."""
        self._drawn.append(batch[keys.INDEX])
        self._updates += 1

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
                    succeeded = self._episode_success[ended].float()
                    self._sums["train/success"].extend(succeeded.unbind())
                    self._episode_success[ended] = False
                self._sums["train/return"].extend(self._episode_return[ended].unbind())
                self._sums["train/episode_length"].extend(self._episode_length[ended].unbind())
                self._episodes += int(ended.sum())
                self._episode_return[ended] = 0
                self._episode_length[ended] = 0

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        elif self._writes:
            print(text, flush=True)

    def log(self, env_steps: int, buffer: VLMReplayBuffer, scoring: AsyncScorer | None) -> None:
        """Write a row if it is time for one."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=env_steps)
        if env_steps < self._next_log:
            return
        self._next_log += self._training.log_every_env_steps
        now = time.perf_counter()
        seconds = now - self._last_time
        row = {name: float(sum(values)) / len(values) for name, values in self._sums.items()}
        row |= self._latest
        row["speed/env_steps_per_s"] = (env_steps - self._last_env_steps) / seconds
        row["speed/updates_per_s"] = self._updates / seconds
        spent = timeit.todict(percall=False, prefix="time")
        row |= {name: total / seconds for name, total in spent.items()}
        timeit.erase()
        row["train/episodes"] = self._episodes
        row |= self._replay_figures(buffer)
        if scoring is not None:
            row |= {f"scoring/{name}": value for name, value in scoring.statistics().items()}
        self._write(env_steps, row)
        self._sums.clear()
        self._drawn.clear()
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

    def _replay_figures(self, buffer: VLMReplayBuffer) -> dict[str, float]:
        figures = {"replay/transitions": float(len(buffer))}
        sampler = buffer.sampler
        if isinstance(sampler, VLMPrioritizedSampler):
            figures["replay/lambda"] = float(sampler.lmbda)
            for name, value in sampler.statistics(len(buffer)).items():
                figures[f"replay/{name}"] = value
            if self._drawn:
                # Of the slots drawn since the last row, those positive by now: a verdict that came
                # after the draw counts as well.
                positive = sampler.positive
                drawn = torch.cat(self._drawn).to(positive.device)
                figures["replay/batch_share_positive"] = positive[drawn].float().mean().item()
        return figures

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
            "sums": {name: torch.stack(values).cpu() for name, values in self._sums.items()},
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
        self._sums.update({name: list(values.unbind()) for name, values in state["sums"].items()})
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
