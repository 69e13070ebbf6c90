"""What holds for every environment of the package; a new file is found and tested as it is."""

from __future__ import annotations

import inspect
import io
import pickle
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from vlmrb_torchrl import envs, keys
from vlmrb_torchrl.envs import DemonstratedEnv, JudgedEnv, ResumableEnv


def environments() -> list[type[EnvBase]]:
    found = {
        member
        for module in pkgutil.iter_modules(envs.__path__)
        if find_spec("ogbench") or not module.name.startswith("ogbench_")
        for member in vars(import_module(f"{envs.__name__}.{module.name}")).values()
        if inspect.isclass(member)
        and issubclass(member, EnvBase)
        and not inspect.isabstract(member)
        and member.__module__.startswith(envs.__name__)
    }
    return sorted(found, key=lambda env: env.__name__)


everyone = pytest.mark.parametrize("make", environments())


def starts(env: Any, episodes: int) -> torch.Tensor:
    return torch.stack([env.reset()[keys.RENDER_STATE] for _ in range(episodes)])


def played(env: Any, td: TensorDict, actions: list[torch.Tensor]) -> tuple[TensorDict, TensorDict]:
    """Outcomes of ``actions`` from ``td`` on, and what the next action would be taken in."""
    outcomes = []
    for action in actions:
        stepped, td = env.step_and_maybe_reset(td.clone().set("action", action))
        outcomes.append(stepped["next"].clone())
    return torch.stack(outcomes), td


def test_no_simulator_is_imported_before_an_environment_is_built() -> None:
    """Nor what a judge needs. torchrl.envs imports mujoco itself, where that is installed."""
    program = (
        "import sys; sys.modules['mujoco'] = None; "
        "import vlmrb_torchrl, vlmrb_torchrl.envs, vlmrb_torchrl.renderers, recipes.tasks; "
        "heavy = {'gymnasium', 'minigrid', 'ogbench', 'dm_control', 'transformers', 'torchvision', "
        "'timm', 'scipy'}; assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@everyone
def test_specs_hold_and_a_judge_can_be_asked_about_the_events(make: type[EnvBase]) -> None:
    check_env_specs(make(num_envs=2), seed=0)
    env = make(num_envs=2, device="cpu")
    check_env_specs(env, seed=0)
    assert isinstance(env, JudgedEnv)
    assert env.success_event in env.event_names
    assert env.success_event in env.prompts
    assert set(env.prompts) <= set(env.event_names)
    happened = env.rollout(5)["next", keys.EVENTS]
    assert happened.dtype == torch.bool
    assert happened.shape == (*env.batch_size, 5, len(env.event_names))
    assert not env.reset()[keys.EVENTS].any()
    assert isinstance(env, DemonstratedEnv)
    assert env.action_spec.is_in(env.demonstrator()(env.reset())["action"])


@everyone
def test_render_states_are_drawn(make: type[EnvBase]) -> None:
    env = make(num_envs=2)
    states = env.rollout(3)["next", keys.RENDER_STATE]
    try:
        frames = env.renderer()(states)
    except RuntimeError as error:
        if "apt-get install" in str(error):  # the renderer says what the system lacks
            pytest.skip(str(error))
        raise
    assert frames.dtype == torch.uint8
    assert frames.shape[:-2] == (2, 3, 3)
    again = pickle.loads(pickle.dumps(env.renderer()))(states)
    assert torch.equal(frames, again)
    env.renderer()(env.observation_spec[keys.RENDER_STATE].zero())


@everyone
def test_episodes_depend_on_the_seed_alone(make: type[EnvBase]) -> None:
    """Not on the number of games; ``set_seed`` restarts the stream, and held-out ones are others.

    Whatever the environments' seeds: the upper bit of 32 tells held-out episodes from training's.
    """
    few, many = make(num_envs=2, seed=5), make(num_envs=3, seed=5)
    first = starts(few, 3)
    assert torch.equal(first, starts(many, 3)[:, :2])
    assert len(first.flatten(0, 1).unique(dim=0)) > 1
    few.set_seed(9)
    assert not torch.equal(first, starts(few, 3))
    few.set_seed(5)
    assert torch.equal(first, starts(few, 3))
    held_out = make(num_envs=2, seed=5, held_out=True)
    assert not torch.equal(first, starts(held_out, 3))
    for seed in (0, 1, 2**40):
        few.set_seed(seed)
        held_out.set_seed(seed)
        for game in range(2):
            for episode in range(50):
                assert 0 <= few.episode_seed(game, episode) < 2**31
                assert 2**31 <= held_out.episode_seed(game, episode) < 2**32


@everyone
def test_copies_and_restored_environments_go_on_with_the_next_episodes(make: type[EnvBase]) -> None:
    env = make(num_envs=2, seed=3)
    starts(env, 2)
    state, copy = env.state_dict(), pickle.loads(pickle.dumps(env))
    following = starts(env, 2)
    other = make(num_envs=2)
    other.load_state_dict(state)
    assert torch.equal(starts(other, 2), following)
    assert torch.equal(starts(copy, 2), following)


@everyone
def test_games_that_are_not_asked_wait(make: type[EnvBase]) -> None:
    """In a partial reset, and in the steps of rollouts that wait until every game is done."""
    env = make(num_envs=3, max_steps=7)
    td = env.rand_step(env.reset())["next"].clone()
    kept = td.clone()
    asked = torch.tensor([[False], [True], [False]])
    fresh = env.reset(td.clone().set("_reset", asked))
    waiting = ~asked.squeeze(-1)
    assert torch.equal(fresh["render_state"][waiting], td["render_state"][waiting])
    assert not torch.equal(fresh["render_state"][1], td["render_state"][1])
    after = env.rand_step(fresh.clone().set("_step", asked.squeeze(-1)))["next"]
    for key in ("observation", "render_state", "done", "terminated", "truncated"):
        assert torch.equal(after[key][waiting], fresh[key][waiting]), key
    assert not after["events"][waiting].any()
    assert not after["reward"][waiting].any()
    rollout = env.rollout(20, break_when_any_done=False, break_when_all_done=True)
    assert rollout.shape == (3, 7)
    assert (td == kept).all()  # what was returned never changes afterwards


@everyone
def test_time_limit_truncates_and_a_collector_begins_new_episodes(make: type[EnvBase]) -> None:
    env = make(num_envs=2, max_steps=5, seed=1)
    collector = Collector(lambda: env, None, frames_per_batch=24, total_frames=24)
    data = next(iter(collector))
    collector.shutdown()
    ends = data["next", "truncated"].squeeze(-1)
    assert ends.nonzero()[:, 1].tolist() == [4, 9, 4, 9]
    assert torch.equal(data["next", "done"].squeeze(-1), ends)
    assert not data["next", "terminated"].any()
    before, after = data["next", "render_state"][:, :-1], data["render_state"][:, 1:]
    same = (before == after).flatten(2).all(-1)
    assert torch.equal(same, ~ends[:, :-1])
    assert not data["events"][:, 1:][ends[:, :-1]].any()
    begun = data["render_state"][:, (0, 5, 10)].transpose(0, 1)
    assert torch.equal(begun, starts(make(num_envs=2, seed=1), 3))


@everyone
def test_env_that_is_put_back_goes_on_exactly_through_the_ends_of_episodes(
    make: type[EnvBase],
) -> None:
    """Noisy demonstrations, saved to a file in mid-episode: things are in hand, and moved."""
    torch.manual_seed(0)
    env = make(num_envs=3, max_steps=30, seed=7)
    assert isinstance(env, ResumableEnv)
    act, td = env.demonstrator(), env.reset()
    for _ in range(20):
        noise = torch.rand(3) < 0.2
        action = act(td.clone())["action"]
        action[noise] = env.action_spec.rand()[noise]
        _, td = env.step_and_maybe_reset(td.clone().set("action", action))
    file = io.BytesIO()
    torch.save(env.games_state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    actions = [env.action_spec.rand() for _ in range(15)]
    expected, _ = played(env, td, actions)
    assert expected["done"].any()
    other = make(num_envs=3, max_steps=30, seed=8)
    played(other, other.reset(), actions[:3])
    other.load_games_state_dict(state)
    got, _ = played(other, td, actions)
    for key in expected.keys(True, True):
        assert torch.equal(got[key], expected[key]), key
