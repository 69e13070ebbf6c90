"""How fast frames are drawn from render states, by ``env.render()``, and copied, on one core.

python -m recipes.benchmarks.rendering                  # 8, 16 and 28 pixels a cell
python -m recipes.benchmarks.rendering --device cuda    # there, too
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from minigrid.envs.doorkey import DoorKeyEnv
from rich.progress import track
from torch import Tensor

from recipes.arguments import program
from recipes.benchmarks.timing import rates, show
from vlmrb_torchrl.checks import checked_device
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


def contestants(
    size: int, tile_size: int, frames: int, device: str
) -> tuple[dict[str, Callable[[], int]], int]:
    """Ways to fill the same frames on one grid size, and the bytes of one frame."""
    # The game without gymnasium's wrappers, whose checks would flatter us.
    env = DoorKeyEnv(size=size, render_mode="rgb_array", tile_size=tile_size)
    states = visited_states(env, frames)
    renderer = MiniGridRenderer(tile_size).on(torch.device(device))
    filled = renderer(states).cpu().numpy()

    def draw() -> int:
        drawn = renderer(states)
        if drawn.is_cuda:
            torch.cuda.synchronize(drawn.device)
        return len(drawn)

    ways = {
        "env.render()": lambda: len([env.render()]),
        "a copy of the frames": lambda: len(filled.copy()),
        "MiniGridRenderer": draw,
    }
    return ways, filled[0].nbytes


def main(
    sizes: tuple[int, ...] = (8, 16),
    tile_sizes: tuple[int, ...] = (8, 16, 28),
    clips: int = 16,
    frames_per_clip: int = 32,
    device: str = "cpu",
    rounds: int = 9,
    seconds: float = 0.2,
) -> None:
    """Compare MiniGridRenderer with MiniGrid's own env.render(), and with copying the frames.

    Args:
        sizes: Edges of the DoorKey grids, in cells.
        tile_sizes: Edges of a cell, in pixels.
        clips: Clips drawn at once.
        frames_per_clip: Frames of each.
        device: Where the renderer draws. Frames are copied on the CPU.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
    """
    checked_device(device, here=True)
    torch.set_num_threads(1)
    frames, rows = clips * frames_per_clip, []
    for size, tile_size in track(list(product(sizes, tile_sizes)), "grids", transient=True):
        ways, frame_bytes = contestants(size, tile_size, frames, device)
        stock, copied, drawn = rates(ways, rounds, seconds).values()
        gigabytes = [f"{speed.median * frame_bytes / 1e9:.1f}" for speed in (drawn, copied)]
        rows.append((f"{size} x {size}", tile_size, drawn, drawn / stock, *gigabytes))
    columns = ("cells", "pixels each", "frames/s", "x env.render()", "GB/s", "a copy's")
    show(f"MiniGridRenderer, {device}, {frames} frames at once", columns, rows)


if __name__ == "__main__":
    program(main)
