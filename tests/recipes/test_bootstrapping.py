"""All four algorithms: |δ| is what it says, and a time limit is no end of the world."""

import pytest
import torch
from lightning.fabric import Fabric
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import check_env_specs

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3
from tests.recipes.chain import ChainEnv, learner

DISCRETE, CONTINUOUS = [DQN, IQN], [SAC, TD3]


def constant(layers, *values):
    """Make layers answer constants: all weights 0, the last bias ``values``."""
    for weight in layers.parameters():
        weight.data.zero_()
    layers[-1].bias.data += torch.tensor(values)


def last_layers(network):
    """What the action values come out of: DQN's layers, IQN's head."""
    return network.mlp if hasattr(network, "mlp") else nn.ModuleList([network.head])


def transitions(observation, action):
    """Rewards of 0.5; the first spans three steps, the second a time limit cuts, the third ends."""
    flag = torch.tensor([[False], [True], [True]])
    return TensorDict(
        {
            "observation": observation,
            "action": action,
            "steps_to_next_obs": torch.tensor([[3], [1], [1]]),
            "next": {
                "observation": observation,
                "reward": torch.full((3, 1), 0.5),
                "done": flag,
                "terminated": torch.tensor([[False], [False], [True]]),
            },
        },
        [3],
    )


def learnt(module, batch):
    """|δ| and figures of an update."""
    td_error, figures = module.update(batch)
    return td_error.tolist(), {name: figure.item() for name, figure in figures.items()}


@pytest.mark.parametrize("algorithm", DISCRETE)
def test_td_error_of_values_is_absolute_and_bootstraps_at_a_time_limit(algorithm):
    """Q is 3, in the target 2, and γ is 0.5.

    The targets are 0.5 + 0.5³ x 2 = 0.75, 0.5 + 0.5 x 2 = 1.5 and, at an end, 0.5. They and Q are
    logged; all quantiles are the same. DQN's loss is Huber's: |δ| - 0.5 beyond 1.
    """
    module = learner(algorithm, gamma=0.5)
    constant(last_layers(module.network), 3.0, 3.0)
    constant(last_layers(module.target), 2.0, 2.0)
    grid = torch.tensor([[1, 0], [2, 0], [1, 0]], dtype=torch.uint8)
    td_error, figures = learnt(module, transitions(grid, torch.tensor([0, 1, 1])))
    assert td_error == pytest.approx([2.25, 1.5, 2.5])
    expected = {"value/q": 3, "value/target": 2.75 / 3, "value/td_error": 6.25 / 3}
    expected |= {"value/spread": 0} if algorithm is IQN else {"loss/value": (1.75 + 1 + 2) / 3}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("algorithm", CONTINUOUS)
def test_td_error_of_critics_is_the_larger_absolute_one_and_bootstraps_at_a_time_limit(algorithm):
    """Critics say 1 and 3, their targets 4 and 2, of which 2 counts; γ is 0.5, the temperature 0.

    The targets are 0.75, 1.5 and 0.5, as above. Of δ = 0.25 and 2.25, -0.5 and 1.5, 0.5 and 2.5
    the larger counts; the losses are the squares. The critics' mean 2 and spread 1 are logged.
    """
    module = learner(algorithm, gamma=0.5)
    if algorithm is SAC:
        module.log_alpha.data.fill_(-100)
    for critics, answers in ((module.critics, (1.0, 3.0)), (module.target, (4.0, 2.0))):
        for critic, answer in zip(critics, answers, strict=True):
            constant(critic, answer)
    td_error, figures = learnt(module, transitions(torch.rand(3, 2), torch.rand(3, 1)))
    assert td_error == pytest.approx([2.25, 1.5, 2.5])
    expected = {"value/q": 2, "value/spread": 1, "value/target": 2.75 / 3}
    expected |= {"value/td_error": 6.25 / 3, "loss/critic": (5.125 + 2.5 + 6.5) / 3}
    expected |= {"train/alpha": 0} if algorithm is SAC else {}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("discrete", [False, True])
def test_chain_is_an_environment(discrete):
    check_env_specs(ChainEnv(2, discrete))


def values(module, env):
    """Q of states A and B, the mean over the critics."""
    if isinstance(module, DQN | IQN):
        return module.network.values(env.states).mean(-1)
    return module.critics(env.states, torch.zeros(2, 1)).mean(-1)


def check_closed_form(module, env):
    expected = [1, 0] if env.terminates else [4 / 3, 2 / 3]
    with torch.no_grad():
        assert values(module, env).tolist() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("terminates", [False, True])
@pytest.mark.parametrize("algorithm", DISCRETE + CONTINUOUS)
def test_values_of_the_chain_are_those_of_the_closed_form(algorithm, terminates):
    """γ = 0.5: 4/3 and 2/3 behind a time limit, 1 and 0 at an end. Learnt from 32 steps."""
    torch.manual_seed(0)
    env = ChainEnv(2, algorithm in DISCRETE, terminates)
    settings = {"hidden_features": (16,), "learning_rate": 0.02, "target_update_rate": 0.3}
    if algorithm is SAC:  # entropy is worth next to nothing
        settings["alpha_init"] = 1e-6
    module = algorithm(env, gamma=0.5, **settings)
    module.prepare(Fabric(accelerator="cpu", devices=1))
    steps = module.transitions(env.rollout(16, break_when_any_done=False)).reshape(-1)
    for _ in range(120):
        getattr(module, module.next_update())(steps)
    check_closed_form(module, env)


def test_the_loop_collects_and_learns_the_same(tmp_path, monkeypatch):
    built = []
    build = cli.build_algorithm
    monkeypatch.setattr(cli, "build_algorithm", lambda *a: built.append(build(*a)) or built[-1])
    arguments = {
        "env": "tests.recipes.chain.Chain",
        "env.discrete": "true",
        "replay": "Uniform",
        "replay.batch_size": 32,
        "algorithm.hidden_features": "[16]",
        "algorithm.gamma": 0.5,
        "algorithm.learning_rate": 0.02,
        "algorithm.target_update_rate": 0.3,
        "training.num_envs": 2,
        "training.warmup_env_steps": 32,
        "training.total_env_steps": 200,
        "training.updates_per_env_step": 1,
        "training.eval_every_env_steps": 0,
        "training.progress": "false",
        "training.log_dir": tmp_path,
    }
    cli.run(DQN, [f"--{name}={value}" for name, value in arguments.items()])
    check_closed_form(built[0], ChainEnv(2, discrete=True))


@pytest.mark.parametrize("algorithm", DISCRETE)
def test_the_online_network_chooses_the_next_action_and_the_target_network_values_it(algorithm):
    """Online Q is (1, 0) and the target's (2, 6), γ is 0.5: δ = 0.5 + 0.5 x 2 - 1 = 0.5.

    Had the target network chosen, it would be 0.5 + 0.5 x 6 - 1 = 2.5.
    """
    module = learner(algorithm, gamma=0.5)
    constant(last_layers(module.network), 1.0, 0.0)
    constant(last_layers(module.target), 2.0, 6.0)
    batch = transitions(torch.tensor([[1, 0]] * 3, dtype=torch.uint8), torch.zeros(3).long())[1:2]
    td_error, _ = module.update(batch)
    assert td_error.item() == pytest.approx(0.5)
