"""What scoring costs: environment steps per second of whole training runs, VLM-RB over PER.

    python -m recipes.benchmarks.training --pairs 5

The two methods are trained in turn, A B A B …, each alone on the machine, so that the ratio of
a pair does not see the machine's drift.  Evaluations are left out of the time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jsonargparse
from rich.console import Console
from rich.progress import track
from rich.table import Table

from recipes.benchmarks.timing import Spread
from recipes.compare import CONFIGS, Run, plan
from recipes.metrics import last_row
from vlmrb_torchrl.checks import ConfigError, require


def measure(run: Run) -> dict[str, float]:
    """Train once; return the last row of training figures."""
    run.start()
    assert run.process is not None
    run.process.wait()
    run.ended()
    return last_row(run.folder)


def training(
    configs: Path = CONFIGS / "doorkey_6x6",
    method: str = "vlm_rb",
    peer: str = "per",
    pairs: int = 5,
    env_steps: int = 60_000,
    extra: list[str] | None = None,
    out: Path = Path("runs/benchmark_training"),
) -> None:
    """Train ``method`` and ``peer`` in turn and print the ratio of their speeds.

    Args:
        configs: Folder of a task's YAML files, as for ``recipes.compare``.
        method: Method that scores clips.
        peer: Method to divide by.
        pairs: Repetitions.
        env_steps: Length of a run, in environment steps.
        extra: Further arguments of every run, as on the recipe's command line.
        out: Folder of the logs.
    """
    require(pairs >= 1, "pairs", pairs, "use at least 1")
    settings = [
        f"--training.total_env_steps={env_steps}",
        f"--training.log_every_env_steps={env_steps}",
        "--training.eval_every_env_steps=0",
        *(extra or []),
    ]
    runs = plan(configs, "dqn", [method, peer], list(range(pairs)), out, settings)
    speeds: dict[str, list[float]] = {method: [], peer: []}
    unscored = 0.0
    for run in track(runs, "runs", transient=True):
        row = measure(run)
        speeds[run.method].append(row["env_steps"] / row["seconds"])
        unscored += row.get("scoring/clips_dropped", 0) + row.get("scoring/clips_failed", 0)
    ours, theirs = Spread(speeds[method]), Spread(speeds[peer])
    table = Table("", "median (lowest to highest)", title=f"{pairs} pairs of {env_steps} env steps")
    table.add_row(f"{method}, env steps/s", str(ours))
    table.add_row(f"{peer}, env steps/s", str(theirs))
    table.add_row(f"{method} ÷ {peer}", str(ours / theirs))
    table.add_row("clips dropped or failed", f"{unscored:.0f}")
    Console().print(table)


if __name__ == "__main__":
    try:
        jsonargparse.auto_cli(training, as_positional=False)
    except ConfigError as error:
        sys.exit(f"training: {error}")
