"""The runs of a study: processes that are started, followed, ended, and known again."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from recipes.running.checkpoint import CHECKPOINTS, has_checkpoint, has_results, locked
from recipes.running.metrics import METRICS_FILE, last_row
from recipes.running.processes import started
from vlmrb_torchrl.checks import require

RECORD = "run.json"
"""What a run is: its place in the study, its settings, and what ran it when."""
POLL_SECONDS = 0.5


@dataclass
class Run:
    """One training run of a study."""

    place: dict[str, Any]  # in the study: algorithm, task, method, judge, variant, seed, …
    command: list[str]
    folder: Path  # whose name is the run's
    process: BaseProcess | None = field(default=None, repr=False)
    bar: TaskID | None = None
    failure: str = ""
    share: float = 0.0  # that is done
    begun: tuple[float, float] = (0.0, 0.0)  # when, and the share that was done
    seconds_per_whole: float | None = None  # seconds that a whole run would take, once known

    @classmethod
    def of_seed(cls, place: dict[str, Any], command: list[str], seed: int, out: Path) -> Run:
        """The run of a seed in the folder ``out``, named by its place."""
        parts = [place[key] for key in ("task", "algorithm", "method", "judge", "variant")]
        name = "-".join(name_of(part) for part in [*parts, f"s{seed}"] if part)
        own = [f"--training.seed={seed}", f"--training.log_dir={out}", f"--training.name={name}"]
        return cls(
            {**place, "seed": seed}, [*command, *own, "--training.progress=false"], out / name
        )

    @property
    def output(self) -> Path:
        """What the process prints."""
        return self.folder / "output.txt"

    @property
    def cell(self) -> tuple[Any, ...]:
        """All of its place but the seed."""
        return tuple(value for key, value in self.place.items() if key != "seed")

    def identity(self) -> list[Any]:
        """What the run depends on: its arguments and what the YAML files among them say.

        Not where they lie, nor which Python runs it: the same run may be asked for in other words.
        """
        paths = [path for flag, path in pairwise(self.command) if flag == "--config"]
        place = "--training.log_dir=", "--training.name="
        words = [word for word in self.command[1:] if word not in (*paths, "--config")]
        files = [yaml.safe_load(Path(path).read_text()) for path in paths]
        return [*(word for word in words if not word.startswith(place)), *files]

    def record(self) -> dict[str, Any]:
        """What was noted of the run that lies in the folder; empty if none does."""
        file = self.folder / RECORD
        record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return record

    def _note(self, record: dict[str, Any]) -> None:
        written = self.folder / f"{RECORD}.writing"  # whole or not at all
        written.write_text(json.dumps(record, indent=1))
        written.replace(self.folder / RECORD)

    def _begun(self) -> bool:
        mine = json.loads(json.dumps(self.identity()))
        return bool(self.record().get("identity") == mine)

    def finished(self) -> bool:
        """Whether this very run has been run to its end; a change of the code is not noticed."""
        return bool(self.record().get("finished")) and self._begun()

    def replaces_another(self) -> bool:
        """Whether the folder holds what a run of other settings has come to."""
        return has_results(self.folder) and not self._begun()

    def start(self) -> None:
        """Start the process, or go on with this very run; it prints into ``output.txt``."""
        with locked(self.folder):  # against its process of before
            command, mode = [*self.command[:3], f"--resume={self.folder}"], "ab"
            if not has_checkpoint(self.folder):
                command, mode = self.command, "wb"
                # What it had come to, without a checkpoint to go on from, is repeated.
                for pattern in ("events.out.tfevents.*", METRICS_FILE, "policy*.ckpt"):
                    for path in self.folder.glob(pattern):
                        path.unlink()
                day = datetime.now(UTC).isoformat(timespec="seconds")
                self._note({**self.place, **origin(), "date": day, "identity": self.identity()})
            self.output.open(mode).close()
        self.follow()
        self.begun = time.perf_counter(), self.share
        self.process = started(command[2:], self.output)

    def follow(self) -> dict[str, float]:
        """Note how far the run has come, and return its last figures."""
        row = last_row(self.folder)
        if row:
            self.share = row["env_steps"] / row["total_env_steps"]
        if (done := self.share - self.begun[1]) > 0:
            self.seconds_per_whole = (time.perf_counter() - self.begun[0]) / done
        return row

    def ended(self) -> bool:
        """Whether the process has ended; ``failure`` says so in one line if it failed."""
        if self.process is None or self.process.is_alive():
            return False
        if self.process.exitcode == 0:
            self._note({**self.record(), "finished": True})
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)  # of many, they are large
        else:
            lines = self.output.read_text().strip().splitlines() or ["(nothing printed)"]
            self.seconds_per_whole = None
            self.failure = f"{self.folder.name} failed: {lines[-1]} (whole output: {self.output})"
        return True


def name_of(text: str) -> str:
    """Turn a text into what a folder may be called."""
    return re.sub(r"[^\w.+]+", "_", text)


def git(*words: str) -> str:
    """What git says of the folder that this code lies in."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


@cache
def origin() -> dict[str, Any]:
    """What runs here: version and commit of the code, and the machine."""
    commit = ""
    with suppress(OSError, subprocess.SubprocessError):  # no git, or a copy that it does not know
        git("ls-files", "--error-unmatch", __file__)
        commit = git("describe", "--always", "--dirty")
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        told = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = told[1] if told else processor
    return {
        "version": version("vlmrb-torchrl"),
        "commit": commit,
        "machine": processor,
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
    }


def seconds_left(runs: list[Run], jobs: int) -> float | None:
    """Seconds until the last of ``runs`` ends, by the speed of each method's so far."""
    known: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        if run.seconds_per_whole is not None:
            known.setdefault(run.cell, []).append(run.seconds_per_whole)
    if not known:
        return None
    whole = {cell: float(np.mean(seconds)) for cell, seconds in known.items()}
    typical = float(np.mean(list(whole.values())))
    unfinished = [run for run in runs if run.share < 1 and not run.failure]
    return sum((1 - run.share) * whole.get(run.cell, typical) for run in unfinished) / jobs


def execute(runs: list[Run], jobs: int, hours: float | None, console: Console) -> None:
    """Run what is not finished, ``jobs`` at a time, or none if a folder holds another run.

    A run that fails leaves the others alone and says why in its ``failure``.

    Args:
        runs: All runs.
        jobs: Processes at a time.
        hours: After which running ones are stopped and no further one is started; None: never.
        console: Where the progress is shown.
    """
    waiting = [run for run in runs if not run.finished()]
    others = [run.folder.name for run in waiting if run.replaces_another()]
    remedy = f"{', '.join(others)} there are of other settings; give another folder, or remove them"
    require(not others, "out", runs[0].folder.parent, remedy)
    planned, end = list(waiting), np.inf if hours is None else time.monotonic() + hours * 3600
    running: list[Run] = []
    shown = "[bold]{task.description}", "{task.percentage:>3.0f} %", "{task.fields[note]}"
    name, share, note = map(TextColumn, shown)
    with Progress(name, BarColumn(), share, TimeElapsedColumn(), note, console=console) as progress:
        total = progress.add_task("all runs", total=len(runs), note="")
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    run.start()
                    run.bar = progress.add_task(run.folder.name, total=1.0, note="")
                    running.append(run)
                ends = [run.process.sentinel for run in running if run.process is not None]
                connection.wait(ends, POLL_SECONDS)
                for run in list(running):
                    show(progress, run)
                    if run.ended():
                        run.share = 1.0
                        running.remove(run)
                        if not console.is_terminal:  # where bars are not shown
                            console.print(run.failure or f"{run.folder.name} is finished")
                        progress.remove_task(run.bar)  # type: ignore[arg-type]
                done = len(runs) - len(waiting) - len(running)
                seconds = seconds_left(planned, jobs)
                left = "" if seconds is None else f", about {seconds / 60:.0f} min left"
                progress.update(
                    total,
                    completed=done + sum(run.share for run in running),
                    note=f"{done} of {len(runs)}{left}",
                )
        finally:
            processes = [run.process for run in running if run.process is not None]
            for process in processes:  # is asked to save and end, if it has not ended
                process.terminate()
            for process in processes:
                process.join()


def show(progress: Progress, run: Run) -> None:
    """Move the bar of a run."""
    row = run.follow()
    measure = "success" if "train/success" in row else "return"
    note = f"{measure} {row[f'train/{measure}']:.2f}" if f"train/{measure}" in row else ""
    progress.update(run.bar, completed=run.share, note=note)  # type: ignore[arg-type]
