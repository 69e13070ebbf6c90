"""DoorKey in a batch is MiniGrid's, step for step; its demonstrator takes the shortest way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from minigrid.core.constants import DIR_TO_VEC
from minigrid.envs.doorkey import DoorKeyEnv as StockDoorKey
from tensordict import TensorDict
from torchrl.envs import step_mdp

from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.renderers import minigrid_render_state


def observed(game: Any) -> list[int]:
    """The observation by its definition: look at every cell of the window, one at a time."""

    def code(x: int, y: int) -> int:
        if not (0 <= x < game.width and 0 <= y < game.height):
            return 0
        thing = game.grid.get(x, y)
        if thing is None:
            return 0
        if thing.type == "door":
            return 4 if thing.is_open else 2 if thing.is_locked else 3
        return {"wall": 1, "key": 5, "goal": 6}[thing.type]

    reach = game.width - 3  # 2n - 1 cells, n = size - 2: n - 1 on each side of the agent
    (x, y), (fx, fy) = game.agent_pos, DIR_TO_VEC[game.agent_dir]
    rx, ry = -fy, fx  # to the right of facing (y grows downwards)
    window = [
        code(int(x + ahead * fx + right * rx), int(y + ahead * fy + right * ry))
        for ahead in range(reach, -reach - 1, -1)
        for right in range(-reach, reach + 1)
    ]
    return [*window, int(game.carrying is not None)]


def assert_same_state(td: TensorDict, game: Any, where: str) -> None:
    assert td["observation"].tolist() == observed(game), where
    assert torch.equal(td["render_state"], minigrid_render_state(game)), where


def door_is_open(game: Any) -> bool:
    return any(
        thing is not None and thing.type == "door" and thing.is_open for thing in game.grid.grid
    )


@pytest.mark.parametrize("size", [5, 6, 7, 16])
def test_every_start_is_stock_minigrid_s(size: int) -> None:
    for held_out in (False, True):
        env, game = DoorKeyEnv(size, 100, seed=size, held_out=held_out), StockDoorKey(size=size)
        for i, start in enumerate(env.reset()["render_state"]):
            game.reset(seed=env.episode_seed(i, 0))
            assert torch.equal(start, minigrid_render_state(game)), i


@pytest.mark.parametrize(("size", "steps"), [(5, 300), (6, 200), (8, 160), (16, 120)])
def test_every_step_equals_stock_minigrid(size: int, steps: int) -> None:
    """Grid, agent, events, reward, ends and carrying, over resets, at play of varied skill.

    The limit of steps makes episodes end both ways; of the three games one acts at random.
    """
    limit, noise = 7 * size, torch.tensor([1.0, 0.3, 0.1])
    env = DoorKeyEnv(size, 3, max_steps=limit, seed=11)
    act, generator = env.demonstrator(), torch.Generator().manual_seed(size)
    stock, episode = [StockDoorKey(size=size, max_steps=limit) for _ in range(3)], [0] * 3
    for i, game in enumerate(stock):
        game.reset(seed=env.episode_seed(i, 0))
    seen, dropped, td = [], 0, env.reset()
    for step in range(steps):
        td = act(td)
        chance = torch.randint(7, (3,), generator=generator)
        td["action"] = torch.where(torch.rand(3, generator=generator) < noise, chance, td["action"])
        outcome, td = env.step_and_maybe_reset(td)
        for i, game in enumerate(stock):
            where, after = f"step {step}, game {i}", outcome["next"][i]
            carried, was_open = game.carrying is not None, door_is_open(game)
            _, reward, terminated, truncated, _ = game.step(outcome["action"][i].item())
            assert_same_state(after, game, where)
            assert after["reward"].item() == pytest.approx(reward, rel=1e-6), where
            ends = [terminated, truncated, terminated or truncated]
            assert [after[e].item() for e in ("terminated", "truncated", "done")] == ends, where
            opened, picked = door_is_open(game) and not was_open, game.carrying and not carried
            assert after["events"].tolist() == [terminated, opened, bool(picked)], where
            seen += [n for n, e in zip(env.event_names, after["events"], strict=True) if e]
            seen += ["late"] if truncated else []
            dropped += carried and game.carrying is None
            if terminated or truncated:
                episode[i] += 1
                game.reset(seed=env.episode_seed(i, episode[i]))
            assert_same_state(td[i], game, where)
    assert {"goal", "door", "key", "late"} == set(seen)
    assert dropped


def test_goal_on_the_last_step_terminates_and_truncates() -> None:
    assert DoorKeyEnv(5, 2).max_steps == 250
    free = DoorKeyEnv(5, 1, seed=4)
    steps = free.rollout(100, free.demonstrator()).shape[1]
    tight = DoorKeyEnv(5, 1, seed=4, max_steps=steps)
    last = tight.rollout(100, tight.demonstrator())["next"][0, -1]
    assert last["terminated"].all()
    assert last["truncated"].all()
    # MiniGrid's 1 - 0.9 steps / max_steps, at steps = max_steps
    assert last["reward"].item() == pytest.approx(0.1)


def fewest_actions(game: Any) -> int:
    """Breadth-first search over copies of MiniGrid's own game."""
    game.gen_obs = dict
    seen, frontier, actions = set(), [game], 0
    while frontier:
        actions += 1
        reached = []
        for state in frontier:
            for action in (0, 1, 2, 3, 4, 5):
                after = copy.deepcopy(state)
                if after.step(action)[2]:
                    return actions
                position = (*map(int, after.agent_pos), after.agent_dir)
                what = (*position, after.grid.encode().tobytes(), after.carrying is None)
                if what not in seen:
                    seen.add(what)
                    reached.append(after)
        frontier = reached
    raise AssertionError("unsolvable")


def demonstrated_actions(game: Any) -> int:
    demonstrator = DoorKeyEnv(5, 1).demonstrator()
    for actions in range(1, 100):
        carries = torch.tensor([[int(game.carrying is not None)]])
        state = {"render_state": minigrid_render_state(game)[None], "observation": carries}
        if game.step(demonstrator(TensorDict(state, [1]))["action"].item())[2]:
            return actions
    raise AssertionError("never solved")


@pytest.mark.parametrize(
    ("seed", "shuffled"),
    [(0, 0), (1, 60), *(pytest.param(seed, 60, marks=pytest.mark.slow) for seed in range(2, 8))],
)
def test_no_sequence_of_actions_is_shorter(seed: int, shuffled: int) -> None:
    """Random actions first: keys lie about, doors stand open or shut behind the agent."""
    generator = torch.Generator().manual_seed(seed)
    game = StockDoorKey(size=5, max_steps=1000)
    game.reset(seed=seed)
    for action in torch.randint(7, (shuffled,), generator=generator).tolist():
        if game.step(action)[2]:
            game.reset(seed=seed)
    assert demonstrated_actions(copy.deepcopy(game)) == fewest_actions(game)


@pytest.mark.parametrize(("size", "noise"), [(5, 0.5), (6, 0.0), (7, 0.0), (16, 0.0)])
def test_every_game_is_solved(size: int, noise: float) -> None:
    """A shortest way takes fewer actions than there are poses, four in each cell.

    Random actions in between never strand it.
    """
    torch.manual_seed(0)
    N = 16
    env = DoorKeyEnv(size, N, max_steps=2000, seed=size)
    demonstrator, state = env.demonstrator(), env.reset()
    solved = torch.zeros(N, dtype=torch.bool)
    for _ in range(1000 if noise else 4 * (size - 2) ** 2):
        state = demonstrator(state)
        chance = torch.rand(N) < noise
        state["action"] = torch.where(chance, env.action_spec.rand(), state["action"])
        state = env.step(state)
        solved |= state["next", "events"][:, 0]
        if solved.all():
            break
        state = step_mdp(state)
    assert solved.all()
