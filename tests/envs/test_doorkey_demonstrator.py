"""The demonstrator solves every DoorKey, in as few actions as MiniGrid allows, from any state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from minigrid.envs.doorkey import DoorKeyEnv as StockDoorKey
from tensordict import TensorDict
from torchrl.envs import step_mdp

from vlmrb_torchrl.envs import DemonstratedEnv, DoorKeyEnv
from vlmrb_torchrl.renderers import minigrid_render_state


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
        state = TensorDict(
            {
                "render_state": minigrid_render_state(game)[None],
                "observation": torch.tensor([[int(game.carrying is not None)]]),
            },
            [1],
        )
        if game.step(demonstrator(state)["action"].item())[2]:
            return actions
    raise AssertionError("never solved")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shuffled", [0, 60], ids=["from the start", "after random actions"])
def test_no_sequence_of_actions_is_shorter(seed: int, shuffled: int) -> None:
    """Random actions first: keys lie about, doors stand open or shut behind the agent."""
    generator = torch.Generator().manual_seed(seed)
    game = StockDoorKey(size=5, max_steps=1000)
    game.reset(seed=seed)
    for action in torch.randint(7, (shuffled,), generator=generator).tolist():
        if game.step(action)[2]:
            game.reset(seed=seed)
    assert demonstrated_actions(copy.deepcopy(game)) == fewest_actions(game)


@pytest.mark.parametrize("size", range(5, 17))
def test_every_game_is_solved(size: int) -> None:
    """A shortest way takes fewer actions than there are poses, four in each cell."""
    env = DoorKeyEnv(size, num_envs=24, seed=size)
    demonstrator, state = env.demonstrator(), env.reset()
    solved = torch.zeros(24, dtype=torch.bool)
    for _ in range(4 * (size - 2) ** 2):
        state = env.step(demonstrator(state))
        solved |= state["next", "events"][:, 0]
        if solved.all():
            break
        state = step_mdp(state)
    assert solved.all()


@pytest.mark.parametrize("seed", range(3))
def test_random_actions_in_between_never_strand_it(seed: int) -> None:
    torch.manual_seed(seed)
    env = DoorKeyEnv(size=5, num_envs=16, max_steps=2000, seed=seed)
    demonstrator, state = env.demonstrator(), env.reset()
    solved = torch.zeros(16, dtype=torch.bool)
    for _ in range(1000):
        state = demonstrator(state)
        noise = torch.rand(16) < 0.5
        state["action"] = torch.where(noise, env.action_spec.rand(), state["action"])
        state = env.step(state)
        solved |= state["next", "events"][:, 0]
        if solved.all():
            break
        state = step_mdp(state)
    assert solved.all()


def test_doorkey_says_that_it_has_a_demonstrator() -> None:
    env = DoorKeyEnv(6, 2)
    assert isinstance(env, DemonstratedEnv)
    assert env.demonstrator()(env.reset())["action"].shape == (2,)
