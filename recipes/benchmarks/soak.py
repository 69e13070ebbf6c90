"""A long run under random faults: does it keep its memory, its processes and every score?

    python -m recipes.benchmarks.soak --minutes 60

Trains DQN with a judge that raises, answers NaN or nonsense, exits and hangs, while this process
kills and stops the judge's process from outside, and looks at the learner's memory, threads, files
and queue.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure
from rich.progress import track

from recipes.arguments import program
from recipes.benchmarks.timing import show
from recipes.running.checkpoint import has_results
from recipes.running.cli import CONFIGS
from recipes.running.metrics import Row, last_row, read_rows
from vlmrb_torchrl.checks import ConfigError, require

FATES = ("scored", "late", "dropped", "failed", "pending", "open")
GOODBYE_SECONDS = 60


def look(process: psutil.Process, seconds: float) -> dict[str, float]:
    """How a process stands after so many seconds."""
    with process.oneshot():
        return {
            "minutes": seconds / 60,
            "resident MB": process.memory_info().rss / 2**20,
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "processes": len(process.children()),
        }


def trouble(process: psutil.Process, chance: random.Random) -> str | None:
    """Kill or stop a child of the learner; what was done, if there was one."""
    for child in process.children():
        with suppress(psutil.NoSuchProcess):  # it ends by itself while it is looked at
            if "descriptor" in " ".join(child.cmdline()):
                kind = chance.choice(("killed", "stopped"))
                child.send_signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
                return kind
    return None


def start(out: Path, rate: float, replay_capacity: int) -> subprocess.Popen[bytes]:
    """Start the training; it goes on until it is stopped."""
    command = [sys.executable, "-m", "recipes.dqn"]
    command += ["--config", str(CONFIGS / "doorkey_6x6" / "dqn.yaml")]
    command += ["--scoring.scorer=recipes.benchmarks.troubled.TroubledScorer"]
    command += [f"--scoring.scorer.rate={rate}", "--scoring.timeout_s=5"]
    command += [f"--replay.capacity={replay_capacity}", "--training.total_env_steps=1000000000"]
    command += ["--training.eval_every_env_steps=0", "--training.progress=false"]
    command += [f"--training.log_dir={out.parent}", f"--training.name={out.name}"]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "output.txt").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def unaccounted(row: Row) -> float:
    """Transitions inserted of which nothing is known."""
    return row["env_steps"] - sum(row[f"scoring/transitions_{fate}"] for fate in FATES)


def flatness(values: list[float]) -> float:
    """Median of the last tenth over that of the first, less 1."""
    tenth = max(len(values) // 10, 1)
    return float(np.median(values[-tenth:]) / np.median(values[:tenth]) - 1)


def draw(looks: list[dict[str, float]], warm: int, path: Path) -> None:
    """Draw memory, threads and files over time."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    names = ("resident MB", "threads", "files")
    for axes, name in zip(figure.subplots(3, sharex=True), names, strict=True):
        axes.plot([each["minutes"] for each in looks], [each[name] for each in looks])
        axes.axvline(looks[warm]["minutes"], linestyle=":", color="grey")
        axes.set(ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.set(xlabel="minutes")
    figure.savefig(path, dpi=140)


def soak(
    minutes: float = 60.0,
    seconds_between_faults: float = 20.0,
    rate: float = 0.01,
    replay_capacity: int = 50_000,
    seed: int = 0,
    out: Path = Path("runs/soak"),
) -> None:
    """Train under faults and report.

    Args:
        minutes: How long.
        seconds_between_faults: Mean time between two faults from outside: the judge's process is
            killed or stopped.
        rate: Share of the judge's calls that misbehave by themselves.
        replay_capacity: Slots of the buffer; memory grows until it is full.
        seed: Of the faults.
        out: Folder of the logs, ``soak.png`` among them.
    """
    require(minutes > 0, "minutes", minutes, "use more than 0")
    require(seconds_between_faults > 0, "seconds_between_faults", seconds_between_faults, "use > 0")
    require(not has_results(out), "out", out, "it holds a run: name another folder, or remove it")
    chance, outside = random.Random(seed), {"killed": 0, "stopped": 0}
    training = start(out, rate, replay_capacity)
    process, looks = psutil.Process(training.pid), []
    try:
        # A judge that does not load at all stops a run, as it should: faults come later.
        while training.poll() is None and not last_row(out):
            time.sleep(1)
        begin, due = time.monotonic(), seconds_between_faults
        for _ in track(range(round(minutes * 60)), "soaking", transient=True):
            time.sleep(1)
            if training.poll() is not None:
                raise ConfigError(f"the run ended by itself: see {out / 'output.txt'}")
            elapsed = time.monotonic() - begin
            looks.append(look(process, elapsed))
            if elapsed > due:
                due = elapsed + chance.expovariate(1 / seconds_between_faults)
                if done := trouble(process, chance):
                    outside[done] += 1
        left = process.children(recursive=True)
    finally:
        training.terminate()
        training.wait(GOODBYE_SECONDS)
    _, left = psutil.wait_procs(left, timeout=GOODBYE_SECONDS)
    report(looks, read_rows(out), outside, replay_capacity, len(left), out)


def report(
    looks: list[dict[str, float]],
    rows: list[Row],
    outside: dict[str, int],
    replay_capacity: int,
    left: int,
    out: Path,
) -> None:
    """Print the table and draw the figure."""
    rows = [row for row in rows if "scoring/clips_submitted" in row]
    minutes = [each["minutes"] for each in looks]
    require(bool(rows), "minutes", minutes[-1], "let it run until it scores")
    full = next((r["seconds"] for r in rows if r["env_steps"] >= 2 * replay_capacity), 0.0)
    warm = min(int(np.searchsorted(minutes, full / 60 + 1)), len(minutes) - 1)
    last = rows[-1]
    faults = {k.split("_")[-1]: v for k, v in last.items() if k.startswith("scoring/faults_")}
    seen = {name: [each[name] for each in looks[warm:]] for name in looks[0]}
    pending = [row["scoring/clips_pending"] for row in rows]
    waiting = f"{np.median(pending):.0f}, {max(pending):.0f}, {pending[-1]:.0f}"
    fates = ", ".join(f"{last[f'scoring/transitions_{fate}']:,.0f} {fate}" for fate in FATES)
    figures = {
        "env steps": f"{last['env_steps']:,.0f}",
        "faults from outside": ", ".join(f"{n} {kind}" for kind, n in outside.items()),
        "faults that the scorer counted": ", ".join(f"{n:.0f} {k}" for k, n in faults.items()),
        "resident MB, last tenth ÷ first, after warm-up": f"{flatness(seen['resident MB']):+.1%}",
        **{
            f"{name}, first and last, most": f"{seen[name][0]}, {seen[name][-1]}, {max(seen[name])}"
            for name in ("threads", "files", "processes")
        },
        "clips waiting, median, most, last": waiting,
        "transitions inserted": fates,
        "unaccounted for, most in any row": f"{max(map(abs, map(unaccounted, rows))):.0f}",
        "children left behind": left,
    }
    show(f"{minutes[-1]:.0f} minutes under faults", ("", "figure"), list(figures.items()))
    draw(looks, warm, out / "soak.png")
    print(f"figure: {out / 'soak.png'}")


if __name__ == "__main__":
    program(soak)
