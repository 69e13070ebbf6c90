"""How fast OGBench's scene steps, by one process and two, and how fast its frames are drawn.

``python -m recipes.benchmarks.scene --help``
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from recipes.benchmarks.timing import Spread, rates
from vlmrb_torchrl.envs import OGBenchEnv

STOCK, DEFAULT = "stock, 1 game", "the defaults"


def stepping_stock(env_id: str) -> Callable[[], int]:
    """OGBench's own environment, stepped at random."""
    import gymnasium
    import ogbench  # noqa: F401

    game = gymnasium.make(env_id, disable_env_checker=True)
    game.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (64, 5)).astype(np.float32)

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = game.step(action)
            if terminated or truncated:
                game.reset()
        return len(actions)

    return work


def stepping(env: OGBenchEnv) -> Callable[[], int]:
    """The batched environment, stepped at random."""
    data = env.reset()

    def work() -> int:
        nonlocal data
        for _ in range(8):
            _, data = env.step_and_maybe_reset(env.rand_action(data))
        return 8 * env.num_envs

    return work


def show(title: str, kind: str, figures: dict[str, Spread], base: str) -> None:
    """Print one table."""
    table = Table(kind, "a second", f"x {base}", title=title)
    for name, spread in figures.items():
        table.add_row(name, str(spread), str(spread / figures[base]))
    Console().print(table)


def main(
    env_id: str = "scene-singletask-task3-v0",
    num_envs: int = 8,
    workers: tuple[int, ...] = (1, 2),
    pixels: tuple[int, ...] = (64, 200, 448),
    rounds: int = 7,
    seconds: float = 1.0,
) -> None:
    """Time environment steps and frames.

    Args:
        env_id: OGBench's name of the task.
        num_envs: Games that are stepped together.
        workers: Processes that they are spread over.
        pixels: Edges of the frames.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
    """
    torch.set_num_threads(1)
    envs = {f"{n} workers": OGBenchEnv(env_id, num_envs, workers=n) for n in workers}
    stepped = rates(
        {STOCK: stepping_stock(env_id), **{n: stepping(env) for n, env in envs.items()}},
        rounds,
        seconds,
    )
    show(f"{env_id}, {num_envs} games, env steps", "environment", stepped, STOCK)
    env = next(iter(envs.values()))
    state = env.rollout(4)["next", "render_state"][:1, -1]
    for each in envs.values():
        each.close()
    options: dict[str, dict[str, Any]]
    options = {f"{edge} x {edge}": {"width": edge, "height": edge} for edge in pixels}
    options |= {
        f"{DEFAULT}: 200 x 200": {},
        "with shadows": {"shadows": True},
        "with shadows, 4 samples: OGBench's": {"shadows": True, "samples": 4},
    }
    renderers = {name: env.renderer(**chosen) for name, chosen in options.items()}
    works = {n: partial(_draw, renderer, state) for n, renderer in renderers.items()}
    drawn = rates(works, rounds, seconds)
    show(f"{env_id}, frames", "frames", drawn, f"{DEFAULT}: 200 x 200")


def _draw(renderer: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor) -> int:
    return len(renderer(state))


if __name__ == "__main__":
    auto_cli(main)
