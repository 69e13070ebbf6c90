"""Frames redrawn from stored cells are MiniGrid's own, byte for byte."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from minigrid.core import world_object as things
from minigrid.core.constants import COLOR_NAMES, COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.envs.doorkey import DoorKeyEnv

from vlmrb_torchrl.renderers import (
    AbstractSprites,
    MiniGridRenderer,
    SwappedSprites,
    minigrid_render_state,
)
from vlmrb_torchrl.renderers.minigrid import _mosaic, _mosaic_on

TILE = 8


def make(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(name, disable_env_checker=True)


def stock_frame(env: Any, tile_size: int = TILE) -> torch.Tensor:
    frame = env.unwrapped.get_frame(highlight=False, tile_size=tile_size)
    return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))


def test_every_cell_is_drawn_as_minigrid_draws_it() -> None:
    """Every object in every colour and state, and the agent over all that it can stand on.

    A goal keeps its colour: MiniGrid's decode turns every one green, its pictures do not.
    """
    makers = [things.Wall, things.Floor, things.Key, things.Ball, things.Box, things.Goal]
    rows = [[make(colour) for colour in COLOR_NAMES] for make in makers]
    for state in ({"is_open": True}, {"is_locked": True}, {}):
        rows.append([things.Door(colour, **state) for colour in COLOR_NAMES])
    rows.append([things.Lava(), None, None, None, None, None])
    env = DoorKeyEnv(size=11)
    env.reset(seed=0)
    env.grid = Grid(11, 6)
    env.width, env.height = 11, 6
    states, frames = [], []
    for x, row in enumerate(rows):
        for y, thing in enumerate(row):
            env.grid.set(x, y, thing)
    for x, y in ((1, 2), (5, 3), (6, 4), (9, 0), (10, 5)):  # floor, goal, open door, lava, nothing
        for direction in range(4):
            env.agent_pos, env.agent_dir = np.array((x, y)), direction
            states.append(minigrid_render_state(env))
            frames.append(stock_frame(env))
    assert torch.equal(MiniGridRenderer(TILE)(torch.stack(states)), torch.stack(frames))


def test_any_tile_size_is_exact() -> None:
    env = DoorKeyEnv(size=5)
    env.reset(seed=0)
    for tile_size in (1, 3, 6, 16, 28):
        frame = MiniGridRenderer(tile_size)(minigrid_render_state(env))
        assert torch.equal(frame, stock_frame(env, tile_size)), tile_size


NAMES = [  # Importing minigrid registered them.
    name for name in gymnasium.registry if name.startswith(("MiniGrid-", "BabyAI-"))
]
SOME = ["MiniGrid-DoorKey-6x6-v0", "MiniGrid-MultiRoom-N2-S4-v0", "BabyAI-GoToObj-v0"]
assert set(SOME) < set(NAMES)
assert len(NAMES) > 150


@pytest.mark.parametrize("names", [SOME, pytest.param(NAMES, marks=pytest.mark.slow)])
def test_frames_equal_minigrids_own(names: list[str]) -> None:
    """On MiniGrid and BabyAI environments (slow: all that load), over random steps and resets."""
    for name in names:
        try:
            env, render = make(name), MiniGridRenderer(TILE)
            env.reset(seed=3)
        except (DependencyNotInstalled, FileNotFoundError):
            # They need packages of minigrid[wfc], and pictures that MiniGrid's wheel leaves out.
            assert "WFC" in name
            continue
        env.action_space.seed(3)
        states, frames = [minigrid_render_state(env)], [stock_frame(env)]
        for _ in range(8):
            *_, terminated, truncated, _ = env.step(env.action_space.sample())
            states.append(minigrid_render_state(env))
            frames.append(stock_frame(env))
            if terminated or truncated:
                env.reset()
        assert torch.equal(render(torch.stack(states)), torch.stack(frames)), name


def empty_state(across: int, down: int, x: int, y: int) -> torch.Tensor:
    state = torch.zeros(across, down, 4, dtype=torch.uint8)
    state[..., 0] = OBJECT_TO_IDX["empty"]
    state[x, y, 3] = 1
    return state


def test_window_is_the_crop_around_the_agent() -> None:
    torch.manual_seed(0)
    for agent, origin in (
        # first = clip(agent - 6 // 2, 0, length - 6), along x (length 9) and y (length 8)
        ((1, 1), (0, 0)),
        ((4, 5), (1, 2)),
        ((7, 6), (3, 2)),
        ((3, 3), (0, 0)),
    ):
        state = empty_state(9, 8, *agent)
        state[..., 0] = torch.randint(1, 10, (9, 8), dtype=torch.uint8)
        state[..., 1] = torch.randint(0, 6, (9, 8), dtype=torch.uint8)
        whole, shown = MiniGridRenderer(TILE)(state), MiniGridRenderer(TILE, window=6)(state)
        x, y = (cell * TILE for cell in origin)
        assert torch.equal(shown, whole[:, y : y + 6 * TILE, x : x + 6 * TILE]), agent


def test_grid_smaller_than_its_window_is_centred_on_black() -> None:
    state = empty_state(5, 6, 2, 2)
    shown = MiniGridRenderer(TILE, window=8)(state)
    whole = MiniGridRenderer(TILE)(state)
    assert shown.shape == (3, 64, 64)
    assert torch.equal(shown[:, 8:56, 8:48], whole)
    shown[:, 8:56, 8:48] = 0
    assert not shown.any()


def test_leading_dimensions_are_kept() -> None:
    states = torch.stack([empty_state(6, 6, 1 + i % 4, 1 + i // 4) for i in range(12)])
    render = MiniGridRenderer(4, window=5)
    frames = render(states)
    assert frames.shape == (12, 3, 20, 20)
    assert frames.dtype == torch.uint8
    assert torch.equal(render(states.view(3, 2, 2, 6, 6, 4)), frames.view(3, 2, 2, 3, 20, 20))
    assert torch.equal(render(states.expand(2, 12, 6, 6, 4))[1], frames)
    assert render(states[:0]).shape == (0, 3, 20, 20)
    # A spec's zeros hold no agent.
    assert render(torch.zeros(2, 6, 6, 4, dtype=torch.uint8)).shape == (2, 3, 20, 20)


def test_renderer_pickles_without_its_tiles_and_draws_the_same() -> None:
    env = DoorKeyEnv(size=8)
    env.reset(seed=1)
    state = minigrid_render_state(env)
    render = MiniGridRenderer(32, window=6, sprites=AbstractSprites(5))
    frame = render(state)
    data = pickle.dumps(render)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)(state), frame)


@pytest.mark.parametrize("edge", [5, 8, 28])
def test_mosaic_of_other_devices_equals_the_cpus(edge: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 3, edge, edge), dtype=np.uint8)
    tiles = pixels.view(f"V{edge}")[..., 0]
    slots = rng.integers(0, 7, (5, 4, 6))
    assert torch.equal(_mosaic_on(torch.device("cpu"), tiles, slots), _mosaic(tiles, slots))


def test_swapped_sprites_draw_one_object_as_another() -> None:
    def state(kind: str, colour: str) -> torch.Tensor:
        cell = [OBJECT_TO_IDX[kind], COLOR_TO_IDX[colour], 0, 1]
        return torch.tensor(cell, dtype=torch.uint8).view(1, 1, 4)

    stock = MiniGridRenderer(16)
    swapped = MiniGridRenderer(16, sprites=SwappedSprites({"goal": "yellow key", "key": "goal"}))
    assert torch.equal(swapped(state("goal", "green")), stock(state("key", "yellow")))
    assert torch.equal(swapped(state("key", "red")), stock(state("goal", "red")))
    assert torch.equal(swapped(state("ball", "red")), stock(state("ball", "red")))


def test_abstract_sprites_follow_the_seed() -> None:
    state = empty_state(5, 5, 2, 2)
    state[4, 4, 0] = OBJECT_TO_IDX["goal"]
    first, again, other = (
        MiniGridRenderer(8, sprites=AbstractSprites(seed))(state) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    tiles = first.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    assert len(tiles.unique(dim=0)) == 3  # empty, agent, goal


def test_games_are_chosen_by_name() -> None:
    env = DoorKeyEnv(size=6)
    env.reset(seed=0)
    state = minigrid_render_state(env)
    frames = {}
    for name, sprites in (("misleading", SwappedSprites()), ("abstract", AbstractSprites())):
        frames[name] = MiniGridRenderer(TILE, sprites=name)(state)
        assert torch.equal(frames[name], MiniGridRenderer(TILE, sprites=sprites)(state))
    frames["standard"] = MiniGridRenderer(TILE, sprites="standard")(state)
    assert torch.equal(frames["standard"], stock_frame(env))
    assert len({frame.numpy().tobytes() for frame in frames.values()}) == 3
    with pytest.raises(ValueError, match="sprites is other: name one of standard, misleading"):
        MiniGridRenderer(TILE, sprites="other")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(6, 6, 4), "float32"),
        (torch.zeros(6, 6, 3, dtype=torch.uint8), r"\[6, 6, 3\]"),
        (torch.full((6, 6, 4), 200, dtype=torch.uint8), "no MiniGrid cell has"),
        (torch.tensor([[[1, 7, 0, 0]]], dtype=torch.uint8), "colour=7"),
        (torch.tensor([[[1, 0, 0, 5]]], dtype=torch.uint8), "agent=5"),
    ],
)
def test_what_is_no_render_state_is_refused(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniGridRenderer()(bad)
