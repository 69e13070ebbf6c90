"""Compiled losses are the same losses, and are compiled once."""

import pytest
import torch
from tensordict import TensorDict

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running.cli import ConfigError
from recipes.sac import SAC
from recipes.settings import Training
from recipes.td3 import TD3
from tests.recipes.chain import ChainEnv


def batch(discrete):
    size = 5
    if discrete:
        observation = torch.tensor([1, 0], dtype=torch.uint8).repeat(size, 1)
        action = torch.randint(2, (size,))
    else:
        observation, action = torch.randn(size, 2), torch.rand(size, 1) * 2 - 1
    drawn = {
        "priority_weight": torch.rand(size),
        "observation": observation,
        "action": action,
        "next": {
            "observation": observation.clone(),
            "reward": torch.randn(size, 1),
            "done": torch.zeros(size, 1, dtype=torch.bool),
            "terminated": torch.zeros(size, 1, dtype=torch.bool),
        },
    }
    return TensorDict(drawn, [size])


def updates(module, batches):
    """Run updates; returns what they leave: losses, |δ| and weights."""
    torch.manual_seed(1)
    optimizers = module.configure_optimizers()
    left = []
    for drawn in batches:
        for name, optimizer in optimizers.items():
            loss = module.training_step(drawn, name)
            if loss is None:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            left.append(loss.detach())
        module.after_update()
        left.append(drawn["td_error"])
    return [*left, *(weight.detach() for weight in module.loss.parameters())]


@pytest.mark.parametrize(
    "algorithm", [DQN, *(pytest.param(each, marks=pytest.mark.slow) for each in (IQN, SAC, TD3))]
)
def test_compiled_losses_are_the_same_and_compiled_once(algorithm):
    """The graph as it was captured, without the C++ of the backend, which rounds otherwise."""
    discrete = algorithm in (DQN, IQN)
    torch.manual_seed(0)
    eager = algorithm(ChainEnv(2, discrete=discrete), hidden_features=(8,))
    torch.manual_seed(0)
    compiled = algorithm(ChainEnv(2, discrete=discrete), hidden_features=(8,))
    compiled.compile_losses(backend="eager")
    batches = [batch(discrete) for _ in range(6)]
    expected = updates(eager, [drawn.clone() for drawn in batches])
    torch.compiler.reset()
    left = updates(compiled, [drawn.clone() for drawn in batches])
    assert len(left) == len(expected)
    for one, other in zip(left, expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.compiler.set_stance("fail_on_recompile"):
        updates(compiled, batches)


def test_missing_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="install no-such-compiler"):
        Training(compile=True)
    Training(compile=False)
