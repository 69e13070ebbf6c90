"""A run's figures: TensorBoard, a progress bar, and a file that is readable while it is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from tensordict import TensorDictBase
from torch import Tensor
from torchrl import timeit

from recipes.learning import Figures
from recipes.replay import Replay
from recipes.settings import Training
from recipes.tasks import Task
from vlmrb_torchrl import AsyncScorer, VLMReplayBuffer, keys

METRICS_FILE = "metrics.jsonl"

Row = dict[str, float]

_SAVED = ["_sums", "_drawn", "_updates", "_latest", "_playing", "_episodes"]
_SAVED += ["_row_env_steps", "_last_point"]


class Telemetry:
    """Collects the figures of a run and writes a row of means every so often.

    ``metrics.jsonl`` holds one JSON object per row: ``env_steps``, ``total_env_steps``,
    ``seconds`` of training (evaluations left out) and the figures under the names that
    TensorBoard shows; ``time/...`` are shares of the seconds between two rows, on CUDA of the
    learner's thread, which does not wait for the kernels. Only rank 0 writes. Where a run is
    ``resumed``, and a state will be loaded, what was written before stays.
    """

    def __init__(
        self, fabric: Fabric, task: Task, training: Training, folder: Path, *, resumed: bool = False
    ) -> None:
        self.folder = folder
        self._writes = fabric.is_global_zero
        self._task, self._training, self._resumed = task, training, resumed
        self._progress: Progress | None = None
        # Since the last row:
        self._sums: dict[str, tuple[Tensor, int]] = {}  # of figures, and how many they are
        self._drawn: list[tuple[int, Tensor, Tensor | None]] = []  # newest slot, slots, weights
        self._updates = 0
        # Since the start:
        self._latest: Row = {}  # figures of the loop
        self._playing: dict[str, Tensor] = {}  # sums of each game's episode
        self._episodes = 0
        self._row_env_steps = 0  # env steps of the last row
        self._last_point = 0  # env steps of the last row, evaluation or picture

    def __enter__(self) -> Telemetry:
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / METRICS_FILE).open("a" if self._resumed else "w")
            self._tensorboard = self._open_tensorboard()
            if self._training.progress:
                note = TextColumn("{task.fields[note]}")
                columns = *Progress.get_default_columns(), MofNCompleteColumn(), note
                self._progress = Progress(*columns)
                self._progress.start()
                total = self._training.total_env_steps
                self._bar = self._progress.add_task(self.folder.name, total=total, note="")
        timeit.erase()
        self._start = self._row_time = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._writes:
            if self._progress is not None:
                self._progress.stop()
            self._file.close()
            self._tensorboard.finalize("success" if error is None else "failed")

    def _open_tensorboard(self, **options: int) -> TensorBoardLogger:
        return TensorBoardLogger(self.folder.parent, name=self.folder.name, version="", **options)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the training time."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._start += elapsed
        self._row_time += elapsed

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, soft_wrap=True)
        elif self._writes:
            print(text, flush=True)

    # ---------------------------------------------------------------- collecting figures

    def _add(self, name: str, total: Tensor, number: int = 1) -> None:
        """Add ``number`` figures to a mean; nothing is read back from the device."""
        before, count = self._sums.get(name, (0, 0))
        self._sums[name] = before + total, count + number

    def note(self, figures: Row) -> None:
        """Keep figures of the training loop for the rows to come."""
        self._latest |= {f"train/{name}": value for name, value in figures.items()}

    def collected(self, data: TensorDictBase) -> None:
        """Note the finished episodes of a collected batch ``[N, T]``."""
        reward = data["next", "reward"].squeeze(-1)
        done = data["next", "done"].squeeze(-1)
        success = self._task.success(data["next"])
        known = {} if success is None else {"success": success}
        figures = {"return": reward, "episode_length": torch.ones_like(reward), **known}
        for step in range(reward.shape[1]):
            ended = done[:, step]
            for name, values in figures.items():
                now = values[:, step]
                before = self._playing.get(name, torch.zeros_like(now))
                total = before | now if name == "success" else before + now  # one is enough
                if ended.any():
                    self._add(f"train/{name}", total[ended].sum(), int(ended.sum()))
                self._playing[name] = total.masked_fill(ended, 0)
            self._episodes += int(ended.sum())

    def episodes_restarted(self) -> None:
        """Forget the episodes in progress."""
        self._playing = {}

    def updated(self, figures: Figures, drawn: TensorDictBase, buffer: VLMReplayBuffer) -> None:
        """Note an update's figures, and what of the buffer was drawn for it."""
        self._updates += 1
        for name, figure in figures.items():
            self._add(name, figure)
        newest = buffer.writer._cursor - 1
        self._drawn.append((newest, drawn[keys.INDEX], drawn.get(keys.WEIGHT, None)))

    @property
    def learning(self) -> dict[str, Tensor]:
        """Losses and gradients' norms since the last row, summed."""
        kinds = ("loss/", "gradient_norm/")
        return {name: total for name, (total, _) in self._sums.items() if name.startswith(kinds)}

    def _replayed(self, buffer: VLMReplayBuffer) -> tuple[Tensor | None, Row]:
        """Slots drawn since the last row, and what there is to say of them."""
        if not self._drawn:
            return None, {}
        ages = [(newest - slots) % buffer.storage.max_size for newest, slots, _ in self._drawn]
        row = {"replay/age_transitions": float(torch.cat(ages).float().mean())}  # of the newest: 0
        weights = [each for _, _, each in self._drawn if each is not None]
        if weights:
            row["replay/least_weight"] = float(torch.cat(weights).min())
        return torch.cat([slots for _, slots, _ in self._drawn]).cpu(), row

    # ---------------------------------------------------------------- writing them

    def log(
        self,
        env_steps: int,
        replay: Replay,
        buffer: VLMReplayBuffer,
        scoring: AsyncScorer | None,
    ) -> None:
        """Write a row if it is time for one; the end of a run always is."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=env_steps)
        due = self._passed(env_steps, self._training.log_every_env_steps)
        if not due and env_steps < self._training.total_env_steps:
            return
        drawn, replayed = self._replayed(buffer)
        now = time.perf_counter()
        seconds = now - self._row_time
        spent = timeit.todict(percall=False, prefix="time")
        row = {
            **{name: float(total) / number for name, (total, number) in self._sums.items()},
            **self._latest,
            **replayed,
            **{name: total / seconds for name, total in spent.items()},
            **{f"replay/{name}": value for name, value in replay.figures(buffer, drawn).items()},
            "speed/env_steps_per_s": (env_steps - self._row_env_steps) / seconds,
            "speed/updates_per_s": self._updates / seconds,
            "train/episodes": self._episodes,
        }
        if scoring is not None:
            row |= {f"scoring/{name}": value for name, value in scoring.statistics().items()}
        self._write(env_steps, row)
        if scoring is not None and self._passed(env_steps, self._training.strip_every_env_steps):
            self._show_clips(env_steps, scoring)
        timeit.erase()
        self._sums.clear()
        self._drawn.clear()
        self._updates = 0
        self._row_time, self._row_env_steps = now, env_steps

    def _passed(self, env_steps: int, every: int) -> bool:
        """Whether a multiple of ``every`` lies between the last row and here; 0 has none."""
        return every > 0 and env_steps // every > self._row_env_steps // every

    def evaluated(self, env_steps: int, result: Row) -> None:
        """Write the figures of an evaluation."""
        self._write(env_steps, {f"eval/{name}": value for name, value in result.items()})
        if self._progress is not None:
            measure = "success" if "success" in result else "return"
            self._progress.update(self._bar, note=f"{measure} {result[measure]:.2f}")

    def _show_clips(self, env_steps: int, scoring: AsyncScorer) -> None:
        for name, (frames, score) in scoring.showcase().items():
            if self._writes:
                self._tensorboard.experiment.add_images(f"clips/{name}", frames, env_steps)
                self._tensorboard.log_metrics({f"clips/{name}_score": score}, env_steps)

    def _write(self, env_steps: int, row: Row) -> None:
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
        seconds = now - self._start, now - self._row_time
        own = {name: getattr(self, name) for name in _SAVED}
        return {**own, "seconds": seconds, "written": written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; rows and points that came after it are forgotten."""
        now = time.perf_counter()
        for name in _SAVED:
            setattr(self, name, state[name])
        self._start, self._row_time = (now - seconds for seconds in state["seconds"])
        if self._writes:
            self._file.truncate(state["written"])
            self._file.seek(0, os.SEEK_END)
            self._tensorboard = self._open_tensorboard(purge_step=self._last_point + 1)


def read_rows(folder: Path) -> list[Row]:
    """Read every whole row of a run's metrics; empty if it has written none yet."""
    rows = []
    with suppress(FileNotFoundError, json.JSONDecodeError):  # of the last line, half written
        for line in (folder / METRICS_FILE).read_text().splitlines():
            rows.append(json.loads(line))
    return rows


def last_row(folder: Path) -> Row:
    """Read the last whole row of a run's metrics; empty if it has written none yet."""
    rows = read_rows(folder)
    return rows[-1] if rows else {}
