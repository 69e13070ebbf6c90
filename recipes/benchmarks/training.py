"""What a replay method costs: speeds of whole training runs, by default VLM-RB over PER.

    python -m recipes.benchmarks.training --pairs 5
    python -m recipes.benchmarks.training --algorithm sac --configs recipes/configs/scene_task1 \
        --method mixture --peer torchrl_per                 # no judge, against TorchRL's own parts

The two methods are trained in turn, A B A B …, each alone on the machine, so that the ratio of
a pair does not see the machine's drift.  Evaluations are left out of the time.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.progress import track

from recipes.arguments import program
from recipes.benchmarks.timing import Spread, show
from recipes.compare import Study, plan
from recipes.running.cli import CONFIGS
from recipes.running.metrics import last_row
from recipes.running.runs import Run
from vlmrb_torchrl.checks import ConfigError, require

PEERS = Path(__file__).parent / "replay"


def measure(run: Run) -> dict[str, float]:
    """Train once; return the last row of training figures.

    Raises:
        ConfigError: If the run failed.
    """
    run.start()
    assert run.process is not None
    run.process.join()
    run.ended()
    if run.failure:
        raise ConfigError(run.failure)
    return last_row(run.folder)


def training(
    configs: Path = CONFIGS / "doorkey_6x6",
    algorithm: str = "dqn",
    method: str = "vlm_rb",
    peer: str = "per",
    pairs: int = 5,
    env_steps: int = 60_000,
    settings: dict[str, Any] = {},  # noqa: B006
    out: Path = Path("runs/benchmark_training"),
) -> None:
    """Train ``method`` and ``peer`` in turn and print the ratio of their speeds.

    Args:
        configs: Folder of a task's YAML files, as for ``recipes.compare``.
        algorithm: Recipe to run.
        method: A method of ``recipes.compare``, or ``mixture``: VLM-RB's buffer and sampler with TD
            boost and no judge; or ``uer_compiled``: ``uer`` with updates compiled.
        peer: Method to divide by: such a one, or ``torchrl_uniform`` or ``torchrl_per``: the same
            loop with TorchRL's own buffer and sampler.
        pairs: Repetitions.
        env_steps: Length of a run, in environment steps.
        settings: Further settings of every run, as for ``recipes.compare``.
        out: Folder of the logs; each call makes one of its own in it.
    """
    require(pairs >= 1, "pairs", pairs, "use at least 1")
    length = {f"training.{name}_env_steps": env_steps for name in ("total", "log_every")}
    own = {path.stem: str(path) for path in PEERS.glob("*.yaml")}
    overlays = [own.get(name, name) for name in (method, peer)]
    out.mkdir(parents=True, exist_ok=True)
    # A new one each time: a run would go on where another was interrupted, and be timed from there.
    folder = Path(mkdtemp(dir=out))
    runs = plan(
        Study(
            algorithms=[algorithm],
            tasks=[str(configs)],
            methods=overlays,
            seeds=pairs,
            settings={**length, "training.eval_every_env_steps": 0, **settings},
            out=folder,
        )
    )
    method, peer = (Path(overlay).stem for overlay in overlays)
    speeds: dict[str, list[float]] = {method: [], peer: []}
    updates: dict[str, list[float]] = {method: [], peer: []}
    unscored = 0.0
    for run in track(runs, "runs", transient=True):
        row = measure(run)
        speeds[run.place["method"]].append(row["env_steps"] / row["seconds"])
        updates[run.place["method"]].append(row["speed/updates_per_s"])
        unscored += row.get("scoring/clips_dropped", 0) + row.get("scoring/clips_failed", 0)
    rows: list[tuple[str, object]] = []
    for name in (method, peer):
        rows.append((f"{name}, env steps/s", Spread(speeds[name])))
        rows.append((f"{name}, updates/s, warm-up included", Spread(updates[name])))
    rows.append((f"{method} ÷ {peer}", Spread(speeds[method]) / Spread(speeds[peer])))
    rows.append(("clips dropped or failed", f"{unscored:.0f}"))
    show(f"{pairs} pairs of {env_steps} env steps", ("", "figure"), rows)


if __name__ == "__main__":
    program(training)
