"""What holds for every environment of the package; a new file is found and tested as it is."""

from __future__ import annotations

import inspect
import pickle
import pkgutil
from importlib import import_module

import pytest
import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from vlmrb_torchrl import envs, keys
from vlmrb_torchrl.envs import JudgedEnv


def environments() -> list[type[EnvBase]]:
    found = {
        member
        for module in pkgutil.iter_modules(envs.__path__)
        for member in vars(import_module(f"{envs.__name__}.{module.name}")).values()
        if inspect.isclass(member)
        and issubclass(member, EnvBase)
        and not inspect.isabstract(member)
        and member.__module__.startswith(envs.__name__)
    }
    return sorted(found, key=lambda env: env.__name__)


everyone = pytest.mark.parametrize("make", environments())


@everyone
def test_specs_hold(make: type[EnvBase]) -> None:
    check_env_specs(make(), seed=0)
    check_env_specs(make(device="cpu"), seed=0)


@everyone
def test_judge_can_be_asked_about_its_events(make: type[EnvBase]) -> None:
    env = make()
    assert isinstance(env, JudgedEnv)
    assert env.success_event in env.event_names
    assert env.success_event in env.prompts
    assert set(env.prompts) <= set(env.event_names)
    rollout = env.rollout(5)
    happened = rollout["next", keys.EVENTS]
    assert happened.dtype == torch.bool
    assert happened.shape == (*rollout.shape, len(env.event_names))
    assert not env.reset()[keys.EVENTS].any()


@everyone
def test_render_states_are_drawn(make: type[EnvBase]) -> None:
    env = make()
    states = env.rollout(3)["next", keys.RENDER_STATE]
    try:
        frames = env.renderer()(states)
    except RuntimeError as error:
        if "apt-get install" in str(error):  # the renderer says what the system lacks
            pytest.skip(str(error))
        raise
    assert frames.dtype == torch.uint8
    assert frames.shape[:-2] == (*env.batch_size, 3, 3)
    again = pickle.loads(pickle.dumps(env.renderer()))(states)
    assert torch.equal(frames, again)
    env.renderer()(env.observation_spec[keys.RENDER_STATE].zero())


@everyone
def test_same_seed_and_actions_give_the_same_rollout(make: type[EnvBase]) -> None:
    def play(seed: int) -> torch.Tensor:
        env = make()
        env.set_seed(seed)
        env.action_spec.seed = 0
        torch.manual_seed(0)
        return env.rollout(10)[keys.RENDER_STATE]

    assert torch.equal(play(3), play(3))
    assert not torch.equal(play(3), play(4))


@everyone
def test_environment_pickles(make: type[EnvBase]) -> None:
    env = make()
    env.set_seed(1)
    restored = pickle.loads(pickle.dumps(env))
    assert (restored.reset() == env.reset()).all()
