"""How fast DoorKeyEnv steps, against MiniGrid through TorchRL's ``GymWrapper``.

``python -m recipes.benchmarks.environment --help``
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jsonargparse import auto_cli
from minigrid.envs.doorkey import DoorKeyEnv as MiniGridDoorKey
from minigrid.wrappers import FullyObsWrapper, ImgObsWrapper
from rich.console import Console
from rich.table import Table
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper

from recipes.benchmarks.timing import rates
from vlmrb_torchrl.envs import DoorKeyEnv

STOCK = "stock, 1 game"


def stock_env(size: int) -> EnvBase:
    """MiniGrid's DoorKey with its full grid observed, one game, as TorchRL wraps it."""
    game = MiniGridDoorKey(size=size)  # without gymnasium's checks, which would flatter us
    # ImgObsWrapper drops the mission, for whose space GymWrapper has no spec.
    return GymWrapper(ImgObsWrapper(FullyObsWrapper(game)), categorical_action_encoding=True)


def stepping(env: EnvBase) -> Callable[[], int]:
    """Random steps with automatic resets, by hand; the work returns env steps."""
    data = env.reset()
    actions = [env.action_spec.rand() for _ in range(256)]
    env_steps = len(actions) * max(int(env.batch_size.numel()), 1)

    def work() -> int:
        nonlocal data
        for action in actions:
            _, data = env.step_and_maybe_reset(data.set("action", action))
        return env_steps

    return work


def collecting(env: EnvBase, frames_per_batch: int) -> tuple[Collector, Callable[[], int]]:
    """The same through a Collector with its random policy."""
    collector = Collector(lambda: env, None, frames_per_batch=frames_per_batch, total_frames=-1)
    batches = iter(collector)

    def work() -> int:
        return int(next(batches).numel())

    return collector, work


def main(
    size: int = 8,
    num_envs: tuple[int, ...] = (16, 32, 64),
    frames_per_batch: int = 1024,
    rounds: int = 7,
    seconds: float = 0.5,
) -> None:
    """Compare env steps/s of DoorKeyEnv with stock MiniGrid's, on one CPU core.

    Args:
        size: Edge of the DoorKey grid, in cells, 5 or more.
        num_envs: Games that DoorKeyEnv steps together.
        frames_per_batch: Env steps of a batch of the Collector.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
    """
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], EnvBase]] = {STOCK: partial(stock_env, size)}
    for games in num_envs:
        makers[f"DoorKeyEnv, {games} games"] = partial(DoorKeyEnv, size, games)
    by_hand = rates({n: stepping(make()) for n, make in makers.items()}, rounds, seconds)
    collectors = {n: collecting(make(), frames_per_batch) for n, make in makers.items()}
    collected = rates({n: work for n, (_, work) in collectors.items()}, rounds, seconds)
    for collector, _ in collectors.values():
        collector.shutdown()

    table = Table(
        title=f"DoorKey {size} x {size}, random policy, env steps/s: median (lowest to highest) "
        f"of {rounds}. Stock: GymWrapper(FullyObsWrapper)."
    )
    table.add_column("environment")
    for column in ("stepped by hand", "x stock", "by a Collector", "x stock"):
        table.add_column(column, justify="right")
    for name in makers:
        row = [str(s) for m in (by_hand, collected) for s in (m[name], m[name] / m[STOCK])]
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main)
