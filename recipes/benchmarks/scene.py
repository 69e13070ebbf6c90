"""How fast OGBench's scene steps, by one process and two, and how fast its frames are drawn.

``python -m recipes.benchmarks.scene --help``
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from recipes.arguments import program
from recipes.benchmarks.environment import stepping
from recipes.benchmarks.timing import against_first, rates, show
from vlmrb_torchrl.envs import OGBenchEnv
from vlmrb_torchrl.renderers import MuJoCoRenderer


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


def draw(renderer: MuJoCoRenderer, state: torch.Tensor) -> int:
    """Draw a batch of states; how many."""
    return len(renderer(state))


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
    steppers = {"stock, 1 game": stepping_stock(env_id)}
    steppers |= {name: stepping(env, steps=8) for name, env in envs.items()}
    stepped = rates(steppers, rounds, seconds)
    env = next(iter(envs.values()))
    state = env.rollout(4)["next", "render_state"][:1, -1]
    for each in envs.values():
        each.close()
    renderers = {
        "the defaults: 200 x 200": env.renderer(),
        **{f"{edge} x {edge}": env.renderer(edge, edge) for edge in pixels},
        "with shadows": env.renderer(shadows=True),
        "with shadows, 4 samples: OGBench's": env.renderer(shadows=True, samples=4),
    }
    works = {name: partial(draw, renderer, state) for name, renderer in renderers.items()}
    for what, speeds in (
        (f"{num_envs} games, env steps", stepped),
        ("frames", rates(works, rounds, seconds)),
    ):
        columns = "", "a second", f"x {next(iter(speeds))}"
        show(f"{env_id}, {what}", columns, against_first(speeds))


if __name__ == "__main__":
    program(main)
