"""All four algorithms: |δ| is what it says, and a time limit is no end of the world."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3
from tests.recipes.chain import Chain, ChainEnv

DISCRETE, CONTINUOUS = [DQN, IQN], [SAC, TD3]


def constant(params, *values):
    """Make networks answer constants: all weights 0, the last bias of network i ``values[i]``."""
    params.apply(lambda leaf: leaf.data.zero_())
    biases = {name: leaf for name, leaf in params.items(True, True) if name[-1] == "bias"}
    last = max(biases, key=lambda name: ("head" in name, name))
    biases[last].data += torch.tensor(values).unsqueeze(-1) if len(values) > 1 else values[0]


def transitions(observation, action):
    """Rewards of 0.5; the first goes on, the second is cut by a time limit, the third ends."""
    flag = torch.tensor([[False], [True], [True]])
    return TensorDict(
        {
            "observation": observation,
            "action": action,
            "next": {
                "observation": observation,
                "reward": torch.full((3, 1), 0.5),
                "done": flag,
                "terminated": torch.tensor([[False], [False], [True]]),
            },
        },
        [3],
    )


def figures(module, batch):
    """What is logged of it, without a random number drawn or the batch changed."""
    drawn, before = torch.random.get_rng_state(), batch.clone()
    said = {name: figure.item() for name, figure in module.figures(batch).items()}
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert (batch == before).all()
    return said


@pytest.mark.parametrize("algorithm", DISCRETE)
def test_td_error_of_values_is_absolute_and_bootstraps_at_a_time_limit(algorithm):
    """Q is 3, in the target 2, and γ is 0.5: δ = 3 - (0.5 + 0.5 x 2) = 1.5, at an end 2.5.

    The targets, 1.5 and twice that and 0.5, and Q are logged; all quantiles are the same.
    """
    module = algorithm(ChainEnv(3, discrete=True), hidden_features=(8,), gamma=0.5)
    constant(module.loss.value_network_params, 3.0)
    constant(module.loss.target_value_network_params, 2.0)
    grid = torch.tensor([[1, 0], [2, 0], [1, 0]], dtype=torch.uint8)
    batch = transitions(grid, torch.tensor([0, 1, 1]))
    module.training_step(batch, "value")
    assert batch["td_error"].flatten().tolist() == pytest.approx([1.5, 1.5, 2.5])
    expected = {"value/q": 3, "value/target": 3.5 / 3, "train/epsilon": 1}
    expected |= {"value/spread": 0} if algorithm is IQN else {}
    assert figures(module, batch) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("algorithm", CONTINUOUS)
def test_td_error_of_critics_is_the_larger_absolute_one_and_bootstraps_at_a_time_limit(algorithm):
    """Critics say 1 and 3, their targets 4 and 2, of which 2 counts; γ is 0.5, the temperature 0.

    The target is 0.5 + 0.5 x 2 = 1.5, so δ is -0.5 and 1.5: 1.5 counts, and the losses are 0.25
    and 2.25. At an end the target is 0.5: δ is 0.5 and 2.5, the losses 0.25 and 6.25. The critics'
    mean 2, their spread 1 and the targets' mean are logged.
    """
    module = algorithm(ChainEnv(3, discrete=False), hidden_features=(8,), gamma=0.5)
    if algorithm is SAC:
        module.loss.log_alpha.data.fill_(-100)
    constant(module.loss.qvalue_network_params, 1.0, 3.0)
    constant(module.loss.target_qvalue_network_params, 4.0, 2.0)
    batch = transitions(torch.rand(3, 2), torch.rand(3, 1))
    loss = module.training_step(batch, "critic")
    assert batch["td_error"].flatten().tolist() == pytest.approx([1.5, 1.5, 2.5])
    assert loss.item() == pytest.approx((2.5 + 2.5 + 6.5) / 3)
    expected = {"value/q": 2, "value/spread": 1, "value/target": 3.5 / 3}
    if algorithm is SAC:
        batch["log_prob"] = torch.tensor([-1.0, 2.0, 2.0])
        expected |= {"train/entropy": -1, "train/alpha": 0}
    assert figures(module, batch) == pytest.approx(expected)


@pytest.mark.parametrize("discrete", [False, True])
def test_chain_is_an_environment(discrete):
    check_env_specs(ChainEnv(2, discrete))


def values(module, env):
    """Q of states A and B, the mean over the critics."""
    states = TensorDict({"observation": env.states}, [2])
    if isinstance(module, (DQN, IQN)):
        return module.actor(states)["action_value"].mean(-1)
    states["action"] = torch.zeros(2, 1)
    both = []
    for params in module.loss.qvalue_network_params.unbind(0):
        with params.to_module(module.loss.qvalue_network):
            both.append(module.loss.qvalue_network(states.clone())["state_action_value"])
    return torch.cat(both, -1).mean(-1)


@pytest.mark.parametrize("terminates", [False, True])
@pytest.mark.parametrize("algorithm", DISCRETE + CONTINUOUS)
def test_values_of_the_chain_are_those_of_the_closed_form(
    algorithm, terminates, tmp_path, monkeypatch
):
    """γ = 0.5: 4/3 and 2/3 behind a time limit, 1 and 0 at an end."""
    built = []
    build = cli.build_algorithm
    monkeypatch.setattr(cli, "build_algorithm", lambda *a: built.append(build(*a)) or built[-1])
    arguments = {
        "env": "tests.recipes.chain.Chain",
        "env.discrete": str(algorithm in DISCRETE).lower(),
        "env.terminates": str(terminates).lower(),
        "replay": "Uniform",
        "replay.batch_size": 32,
        "algorithm.hidden_features": "[16]",
        "algorithm.gamma": 0.5,
        "algorithm.learning_rate": 0.02,
        "algorithm.target_update_rate": 0.1,
        "training.num_envs": 2,
        "training.warmup_env_steps": 32,
        "training.total_env_steps": 500,
        "training.updates_per_env_step": 1,
        "training.eval_every_env_steps": 0,
        "training.progress": "false",
        "training.log_dir": tmp_path,
    }
    if algorithm is SAC:  # entropy is worth next to nothing
        arguments["algorithm.alpha_init"] = 1e-6
    cli.run(algorithm, [f"--{name}={value}" for name, value in arguments.items()])
    expected = [1, 0] if terminates else [4 / 3, 2 / 3]
    with torch.no_grad():
        assert values(built[0], Chain(algorithm in DISCRETE).make(1, 0)).tolist() == pytest.approx(
            expected, abs=0.05
        )
