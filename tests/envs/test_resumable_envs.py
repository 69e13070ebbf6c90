"""An environment that is put back goes on step by step as the one that never stopped."""

import io
from functools import partial

import pytest
import torch

from vlmrb_torchrl.envs import DoorKeyEnv, OGBenchEnv, ResumableEnv

ENVS = {
    "doorkey": partial(DoorKeyEnv, 5, 3, max_steps=30),
    "cube": partial(OGBenchEnv, "cube-single-singletask-task1-v0", 2, max_steps=12),
    "scene": partial(OGBenchEnv, "scene-singletask-task4-v0", 2, max_steps=12),
    "cube, two processes": partial(
        OGBenchEnv, "cube-single-singletask-task1-v0", 2, max_steps=12, workers=2
    ),
}
SLOW = {"cube, two processes"}


def played(env, td, actions):
    """Outcomes of ``actions`` from ``td`` on, and what the next action would be taken in."""
    outcomes = []
    for action in actions:
        stepped, td = env.step_and_maybe_reset(td.clone().set("action", action))
        outcomes.append(stepped["next"].clone())
    return torch.stack(outcomes), td


def travelled(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ENVS]
)
def test_env_that_is_put_back_goes_on_exactly_through_the_ends_of_episodes(name):
    if name != "doorkey":
        pytest.importorskip("ogbench")
    torch.manual_seed(0)
    env = ENVS[name](seed=7)
    assert isinstance(env, ResumableEnv)
    steps = 60 if name == "doorkey" else 17
    actions = [env.action_spec.rand() for _ in range(2 * steps)]
    _, td = played(env, env.reset(), actions[:steps])
    state = travelled(env.games_state_dict())
    expected, _ = played(env, td, actions[steps:])
    other = ENVS[name](seed=8)
    _, _ = played(other, other.reset(), actions[:5])
    other.load_games_state_dict(state)
    got, _ = played(other, td, actions[steps:])
    assert expected["done"].any()
    for key in expected.keys(True, True):
        assert torch.equal(got[key], expected[key]), key
    env.close()
    other.close()


def test_doorkey_goes_on_with_the_key_in_hand_and_the_door_open():
    """Scripted play, saved at each step: the next outcomes are those of the original."""
    env = DoorKeyEnv(5, 2, seed=3)
    policy, td = env.demonstrator(), env.reset()
    seen = set()
    for _ in range(60):
        action = policy(td.clone())["action"]
        other = DoorKeyEnv(5, 2)
        other.load_games_state_dict(travelled(env.games_state_dict()))
        seen |= {(game.carrying is not None) for game in other._games}
        (theirs, _), (ours, following) = (
            e.step_and_maybe_reset(td.clone().set("action", action)) for e in (other, env)
        )
        for key in ours["next"].keys(True, True):
            assert torch.equal(theirs["next", key], ours["next", key]), key
        seen |= {
            name for i, name in enumerate(env.event_names) if ours["next", "events"][:, i].any()
        }
        td = following
    assert seen == {True, False, "goal", "door", "key"}
