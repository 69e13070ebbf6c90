"""How many times faster frames are drawn from render states than by ``env.render()``, on one core.

``python -m recipes.benchmarks.rendering --help``
"""

from __future__ import annotations

import torch
from minigrid.envs.doorkey import DoorKeyEnv
from torch import Tensor

from recipes.arguments import program
from recipes.benchmarks.timing import Spread, against_first, rates, show
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
    whole, window = MiniGridRenderer(tile_size), MiniGridRenderer(tile_size, min(size, 8))
    contestants = {
        "env.render()": lambda: len([env.render()]),
        "MiniGridRenderer": lambda: len(whole(states)),
        f"its window of {min(size, 8)} x {min(size, 8)}": lambda: len(window(states)),
    }
    return rates(contestants, rounds, seconds)


def main(
    sizes: tuple[int, ...] = (8, 16),
    tile_size: int = 8,
    clips: int = 16,
    frames_per_clip: int = 32,
    rounds: int = 9,
    seconds: float = 0.2,
) -> None:
    """Compare MiniGridRenderer with MiniGrid's own env.render().

    Args:
        sizes: Edges of the DoorKey grids, in cells.
        tile_size: Edge of a cell, in pixels.
        clips: Clips drawn at once.
        frames_per_clip: Frames of each.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
    """
    torch.set_num_threads(1)
    frames = clips * frames_per_clip
    measured = {size: race(size, tile_size, frames, rounds, seconds) for size in sizes}
    show(
        f"MiniGrid, tiles of {tile_size} pixels, {frames} frames at once",
        ("drawn by", "grid", "frames/s", "x env.render()"),
        [
            (name, f"{size} x {size}", *figures)
            for size, speeds in measured.items()
            for name, *figures in against_first(speeds)
        ],
    )


if __name__ == "__main__":
    program(main)
