"""How fast DoorKeyEnv steps, against MiniGrid through TorchRL's ``GymWrapper``, on one core.

``python -m recipes.benchmarks.environment --help``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from minigrid.envs.doorkey import DoorKeyEnv as MiniGridDoorKey
from minigrid.wrappers import FullyObsWrapper, ImgObsWrapper
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper

from recipes.arguments import program
from recipes.benchmarks.timing import against_first, rates, show
from vlmrb_torchrl.envs import DoorKeyEnv


def stock_env(size: int) -> EnvBase:
    """MiniGrid's DoorKey with its full grid observed, one game, as TorchRL wraps it."""
    game = MiniGridDoorKey(size=size)  # without gymnasium's checks, which would flatter us
    # ImgObsWrapper drops the mission, for whose space GymWrapper has no spec.
    return GymWrapper(ImgObsWrapper(FullyObsWrapper(game)), categorical_action_encoding=True)


def stepping(env: EnvBase, steps: int = 256) -> Callable[[], int]:
    """Random steps with automatic resets, by hand; the work returns env steps."""
    data = env.reset()
    actions = [env.action_spec.rand() for _ in range(steps)]
    env_steps = len(actions) * max(int(env.batch_size.numel()), 1)

    def work() -> int:
        nonlocal data
        for action in actions:
            _, data = env.step_and_maybe_reset(data.set("action", action))
        return env_steps

    return work


def collect(batches: Iterator[TensorDictBase]) -> int:
    """A batch of the collector's; its env steps."""
    return int(next(batches).numel())


def main(
    size: int = 8,
    num_envs: tuple[int, ...] = (16, 32, 64),
    frames_per_batch: int = 1024,
    rounds: int = 7,
    seconds: float = 0.5,
) -> None:
    """Compare env steps/s of DoorKeyEnv with stock MiniGrid's, under a random policy.

    Args:
        size: Edge of the DoorKey grid, in cells, 5 or more.
        num_envs: Games that DoorKeyEnv steps together.
        frames_per_batch: Env steps of a batch of the Collector.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
    """
    torch.set_num_threads(1)

    def envs() -> dict[str, EnvBase]:
        ours = {f"DoorKeyEnv, {n} games": DoorKeyEnv(size, n) for n in num_envs}
        return {"stock, 1 game": stock_env(size), **ours}

    by_hand = rates({name: stepping(env) for name, env in envs().items()}, rounds, seconds)
    collectors = {
        name: Collector(env, None, frames_per_batch=frames_per_batch, total_frames=-1)
        for name, env in envs().items()
    }
    batches = {name: iter(collector) for name, collector in collectors.items()}
    works = {name: partial(collect, batch) for name, batch in batches.items()}
    collected = rates(works, rounds, seconds)
    for collector in collectors.values():
        collector.shutdown()
    show(
        f"DoorKey {size} x {size}, env steps/s. Stock: GymWrapper(FullyObsWrapper).",
        ("environment", "stepped by hand", "x stock", "by a Collector", "x stock"),
        [
            (*left, *right)
            for left, (_, *right) in zip(
                against_first(by_hand), against_first(collected), strict=True
            )
        ],
    )


if __name__ == "__main__":
    program(main)
