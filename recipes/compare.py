"""Compare replay methods on one task: same seeds, same budget, in parallel, with intervals.

    python -m recipes.compare                                   # UER, PER, VLM-RB on DoorKey-6x6
    python -m recipes.compare --methods '[uer, vlm_rb]' --seeds 10 --first_seed 100

Each run is a process of its own.  Ctrl-C stops them; the same command goes on with the runs
that are not finished, each from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from recipes.arguments import program
from recipes.running.checkpoint import CHECKPOINTS, has_checkpoint, has_results, locked
from recipes.running.cli import CONFIGS, advice, rehearse
from recipes.running.metrics import METRICS_FILE, last_row
from vlmrb_torchrl.checks import ConfigError, require

METHODS = CONFIGS / "methods"
POLL_SECONDS = 0.5


@dataclass
class Run:
    """One training run of a comparison."""

    method: str  # name of its YAML file, without the ending
    command: list[str]
    folder: Path  # whose name is the run's
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    bar: TaskID | None = None

    def identity(self) -> str:
        """What the run depends on: its arguments and the text of the YAML files among them.

        Not where they lie, nor which Python runs it: the same run may be asked for in other words.
        """
        paths = [path for flag, path in pairwise(self.command) if flag == "--config"]
        elsewhere = (*paths, f"--training.log_dir={self.folder.parent}")
        arguments = [word for word in self.command[1:] if word not in elsewhere]
        return json.dumps([*arguments, *(Path(path).read_text() for path in paths)])

    def _marked(self, marker: str) -> bool:
        file = self.folder / marker
        return file.exists() and file.read_text() == self.identity()

    def finished(self) -> bool:
        """Whether this very run has been run to its end; a change of the code is not noticed."""
        return self._marked("finished.json")

    def replaces_another(self) -> bool:
        """Whether the folder holds what a run of other settings has come to."""
        return has_results(self.folder) and not self._marked("started.json")

    def start(self) -> None:
        """Start the process, or go on with this very run; it prints into ``output.txt``."""
        with locked(self.folder):  # against its process of before
            command, mode = [*self.command[:3], f"--resume={self.folder}"], "ab"
            if not has_checkpoint(self.folder):
                command, mode = self.command, "wb"
                # What it had come to, without a checkpoint to go on from, is repeated.
                for pattern in ("events.out.tfevents.*", METRICS_FILE, "policy.ckpt"):
                    for path in self.folder.glob(pattern):
                        path.unlink()
                (self.folder / "started.json").write_text(self.identity())
            output = (self.folder / "output.txt").open(mode)
        with output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def ended(self) -> bool:
        """Whether the process has ended.

        Raises:
            ConfigError: If it failed, with the last line that it printed.
        """
        if self.process is None or (code := self.process.poll()) is None:
            return False
        if code != 0:
            output = self.folder / "output.txt"
            lines = output.read_text().strip().splitlines() or ["(nothing printed)"]
            raise ConfigError(f"{self.folder.name} failed: {lines[-1]} (whole output: {output})")
        (self.folder / "finished.json").write_text(self.identity())
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)  # of many runs they are large
        return True


def plan(
    configs: Path, algorithm: str, methods: list[str], seeds: list[int], out: Path, extra: list[str]
) -> list[Run]:
    """List the runs, seed by seed, so that every method meets the same load of the machine."""
    shared = configs / f"{algorithm}.yaml"
    require(shared.is_file(), "configs", configs, f"it should hold {shared.name}")
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    remedy = f"use some of {', '.join(known)}, or paths of YAML files"
    overlays = [METHODS / f"{name}.yaml" if name in known else Path(name) for name in methods]
    for method, overlay in zip(methods, overlays, strict=True):
        require(overlay.is_file(), "methods", method, remedy)
    names = {overlay.stem for overlay in overlays}
    require(len(names) == len(methods), "methods", methods, "give each another file name")
    runs = []
    for seed in seeds:
        for overlay in overlays:
            name = f"{overlay.stem}_s{seed}"
            command = [sys.executable, "-m", f"recipes.{algorithm}"]
            command += ["--config", str(shared), "--config", str(overlay)]
            command += [f"--training.seed={seed}", f"--training.log_dir={out}"]
            command += [f"--training.name={name}", "--training.progress=false", *extra]
            runs.append(Run(overlay.stem, command, out / name))
    return runs


def check(runs: list[Run], algorithm: str) -> set[str]:
    """Refuse what a run would refuse at its start, or only the report at the end.

    Returns:
        What the runs would be advised.
    """
    said = set()
    recipe = getattr(import_module(f"recipes.{algorithm}"), algorithm.upper())
    for run in runs:
        try:
            settings = rehearse(recipe, run.command[3:])
        except ConfigError as error:
            raise ConfigError(f"{run.method}: {error}") from error
        every = settings.training.eval_every_env_steps
        require(every > 0, "training.eval_every_env_steps", every, "evaluations are compared")
        said.add(advice(recipe, settings))
    return said - {""}


def execute(runs: list[Run], jobs: int, progress: Progress) -> None:
    """Run all, ``jobs`` at a time, or none if a folder holds what another run has come to."""
    waiting = [run for run in runs if not run.finished()]
    for run in waiting:
        remedy = f"its {run.folder.name} is of other settings; give another folder, or remove that"
        require(not run.replaces_another(), "out", run.folder.parent, remedy)
    done = len(runs) - len(waiting)
    total = progress.add_task("all runs", total=len(runs), completed=done, note="")
    running: list[Run] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.start()
                run.bar = progress.add_task(run.folder.name, total=None, note="")
                running.append(run)
            with suppress(subprocess.TimeoutExpired):
                running[0].process.wait(POLL_SECONDS)  # type: ignore[union-attr]
            for run in list(running):
                show(progress, run)
                if run.ended():
                    running.remove(run)
                    progress.remove_task(run.bar)  # type: ignore[arg-type]
                    progress.advance(total)
    finally:
        processes = [run.process for run in running if run.process is not None]
        for process in processes:  # is asked to save and end, if it has not ended
            process.terminate()
        for process in processes:
            process.wait()


def show(progress: Progress, run: Run) -> None:
    """Move the bar of a run."""
    row = last_row(run.folder)
    if row and run.bar is not None:
        measure = "success" if "train/success" in row else "return"
        note = f"{measure} {row[f'train/{measure}']:.2f}" if f"train/{measure}" in row else ""
        done, total = row["env_steps"], row.get("total_env_steps")
        progress.update(run.bar, completed=done, total=total, note=note)


def compare(
    configs: Path = CONFIGS / "doorkey_6x6",
    algorithm: str = "dqn",
    methods: list[str] = ["uer", "per", "vlm_rb"],  # noqa: B006
    seeds: int = 3,
    first_seed: int = 0,
    jobs: int | None = None,
    out: Path = Path("runs/compare"),
    extra: list[str] = [],  # noqa: B006
) -> None:
    """Train every method on every seed, then print a table and draw the curves.

    Args:
        configs: Folder of a task, whose ``<algorithm>.yaml`` holds what all methods share.
        algorithm: Recipe to run.
        methods: Names in ``recipes/configs/methods``, or paths of YAML files of one's own, laid
            over the task's and named by their stems; differences are taken against ``uer`` and
            ``per``.
        seeds: Runs per method.
        first_seed: The seeds are ``first_seed``, ``first_seed + 1``, …
        jobs: Runs at a time; null: one for each core.
        out: Folder of logs, table and curves.
        extra: Further arguments of every run, such as ``['--training.total_env_steps=50000']``.
    """
    from recipes.running.report import report  # matplotlib and scipy, which --help does without

    require(seeds >= 1, "seeds", seeds, "use at least 1")
    require(first_seed >= 0, "first_seed", first_seed, "use 0 or more")
    require(jobs is None or jobs >= 1, "jobs", jobs, "use at least 1, or null")
    require(bool(methods), "methods", methods, "name at least one")
    console, numbers = Console(), list(range(first_seed, first_seed + seeds))
    runs = plan(configs, algorithm, methods, numbers, out, extra)
    for advised in check([run for run in runs[: len(methods)] if not run.finished()], algorithm):
        console.print(advised, soft_wrap=True)
    if done := sum(run.finished() for run in runs):
        console.print(f"{done} of {len(runs)} runs lie finished in {out}; remove it to repeat them")
    shown = "[bold]{task.description}", "{task.completed:>7.0f}", "{task.fields[note]}"
    name, steps, note = map(TextColumn, shown)
    columns = name, BarColumn(), steps, TimeElapsedColumn(), note
    with locked(out), Progress(*columns, console=console) as progress:
        execute(runs, jobs or len(os.sched_getaffinity(0)), progress)
    folders: dict[str, list[Path]] = {}
    for run in runs:
        folders.setdefault(run.method, []).append(run.folder)
    report(folders, out, console)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    # Ended from outside or by Ctrl-C, the runs are stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        program(compare, argv)
    except KeyboardInterrupt:
        sys.exit("compare: stopped; the same command goes on with the unfinished runs")


if __name__ == "__main__":
    main()
