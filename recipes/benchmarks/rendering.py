"""How many times faster frames are drawn from render states than by ``env.render()``.

``python -m recipes.benchmarks.rendering --help``
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli
from minigrid.envs.doorkey import DoorKeyEnv
from rich.console import Console
from rich.table import Table
from torch import Tensor

from recipes.benchmarks.timing import Spread, rates
from vlmrb_torchrl.renderers import MiniGridRenderer, minigrid_render_state


def visited_states(env: DoorKeyEnv, frames: int) -> Tensor:
    """Play at random: render states ``[frames, W, H, 4]``, as a replay buffer holds them."""
    env.reset(seed=0)
    env.action_space.seed(0)
    states = []
    for _ in range(frames):
        states.append(minigrid_render_state(env))
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return torch.stack(states)


def race(size: int, tile_size: int, frames: int, rounds: int, seconds: float) -> dict[str, Spread]:
    """Frames per second of MiniGrid and of the renderer, on one grid size."""
    # The game without gymnasium's wrappers, whose checks would flatter us.
    env = DoorKeyEnv(size=size, render_mode="rgb_array", tile_size=tile_size)
    states = visited_states(env, frames)
    whole = MiniGridRenderer(tile_size)
    window = MiniGridRenderer(tile_size, window=min(size, 8))

    def drawn_by_minigrid() -> int:
        env.render()
        return 1

    return rates(
        {
            "env.render()": drawn_by_minigrid,
            "MiniGridRenderer": lambda: len(whole(states)),
            f"its {min(size, 8)} x {min(size, 8)} window": lambda: len(window(states)),
        },
        rounds,
        seconds,
    )


def main(
    sizes: tuple[int, ...] = (8, 16),
    tile_size: int = 8,
    clips: int = 16,
    frames_per_clip: int = 32,
    rounds: int = 9,
    seconds: float = 0.2,
) -> None:
    """Compare MiniGridRenderer with MiniGrid's own env.render(), on one CPU core.

    Args:
        sizes: Edges of the DoorKey grids, in cells.
        tile_size: Edge of a cell, in pixels.
        clips: Clips drawn at once.
        frames_per_clip: Frames of each.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
    """
    torch.set_num_threads(1)
    table = Table(
        title=f"MiniGrid, tiles of {tile_size} pixels, {clips * frames_per_clip} frames "
        f"at once; median (lowest to highest) of {rounds}"
    )
    for column in ("grid", "drawn by", "frames/s", "x env.render()"):
        table.add_column(column, justify="right" if "/" in column or "x" in column else "left")
    for size in sizes:
        measured = race(size, tile_size, clips * frames_per_clip, rounds, seconds)
        for name, speed in measured.items():
            ratio = speed / measured["env.render()"]
            table.add_row(f"{size} x {size}", name, str(speed), str(ratio))
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main)
