"""The cosine quantile network, worked by hand with weights set by hand."""

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import QValueActor

from tests.objectives.lines import transitions
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.objectives import IQNLoss, QuantileNetwork, cvar


def by_hand(policy_quantiles=2, distortion=None, **keys):
    """Z_τ(x, a) = ±x φ(τ) for the two actions, with φ(τ) = ReLU(cos 0 + cos πτ) = 1 + cos πτ."""
    network = QuantileNetwork(
        nn.Identity(),
        nn.Linear(1, 2, bias=False),
        num_features=1,
        num_cosines=2,
        policy_quantiles=policy_quantiles,
        distortion=distortion,
        **keys,
    )
    with torch.no_grad():
        network.embedding.weight.fill_(1.0)
        network.embedding.bias.zero_()
        network.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    return network


def state(**entries):
    return TensorDict({"observation": torch.tensor([[1.0], [3.0]]), **entries}, [2])


def test_quantiles_are_what_they_are_by_hand():
    """φ(0) = 2, φ(½) = 1, φ(1) = 0; x is 1, then 3."""
    tau = torch.tensor([[0.0, 0.5], [0.5, 1.0]])
    out = by_hand()(state(tau=tau))
    expected = [[[2.0, -2.0], [1.0, -1.0]], [[3.0, -3.0], [0.0, 0.0]]]
    torch.testing.assert_close(out["quantiles"], torch.tensor(expected))
    # Their means: (2 + 1)/2 and (3 + 0)/2.
    torch.testing.assert_close(out["action_value"], torch.tensor([[1.5, -1.5], [1.5, -1.5]]))


@pytest.mark.parametrize(
    ("distortion", "phi"),
    [
        # Midpoints ¼ and ¾, whose cosines cancel: φ is 1 on the average.
        (None, 1.0),
        # The worst half is seen at ⅛ and ⅜: 1 + (cos π/8 + cos 3π/8)/2.
        (
            partial(cvar, risk_level=0.5),
            1 + (math.cos(math.pi / 8) + math.cos(3 * math.pi / 8)) / 2,
        ),
    ],
)
def test_network_acts_by_the_mean_over_distorted_midpoints(distortion, phi):
    out = by_hand(distortion=distortion)(state())
    expected = torch.tensor([[phi, -phi], [3 * phi, -3 * phi]])
    torch.testing.assert_close(out["action_value"], expected)
    assert "quantiles" not in out
    assert "tau" not in out


def test_acting_is_the_mean_over_quantiles_whether_the_head_is_linear_or_not():
    """The double below hides that its head is linear, and takes the long way round."""
    network = by_hand(policy_quantiles=5)
    expected = network(state(tau=network.policy_tau.expand(2, 5)))["quantiles"].mean(-2)
    torch.testing.assert_close(network(state())["action_value"], expected)
    network.head = nn.Sequential(network.head)
    torch.testing.assert_close(network(state())["action_value"], expected)


def test_loss_finds_quantiles_under_keys_that_both_are_told_and_refuses_others_in_one_line():
    renamed = {"tau": "fraction", "quantiles": "values"}
    batch = transitions([1], [0], [1.0], [2], [False])
    values = {}
    for keys in ({}, {f"{name}_key": key for name, key in renamed.items()}):
        loss = IQNLoss(QValueActor(by_hand(**keys), spec=Categorical(2)))
        if keys:
            loss.set_keys(**renamed)
        loss.make_value_estimator(gamma=0.5)
        torch.manual_seed(0)
        values[bool(keys)] = loss(batch.clone())["loss"]
    assert torch.equal(values[False], values[True])
    loss = IQNLoss(QValueActor(by_hand(), spec=Categorical(2)))
    loss.set_keys(**renamed)
    with pytest.raises(KeyError, match=r"'fraction', wrote no 'values'.*tau_key") as refusal:
        loss(batch)
    assert "\n" not in str(refusal.value)


def test_acting_draws_no_random_number():
    network, before = by_hand(), torch.get_rng_state()
    network(state())
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_over_many_midpoints_is_the_integral():
    """∫ 1 + cos πτ dτ over (0, 1) is 1, over the worst tenth 1 + sin(π/10)/(π/10)."""
    risk = 0.1
    for distortion, integral in (
        (None, 1.0),
        (partial(cvar, risk_level=risk), 1 + math.sin(math.pi * risk) / (math.pi * risk)),
    ):
        value = by_hand(1000, distortion)(state())["action_value"]
        assert value[0, 0].item() == pytest.approx(integral, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"policy_quantiles": 0}, "policy_quantiles is 0"),
        ({"distortion": lambda tau: tau + 1}, r"distortion\(tau\) is \[1"),
    ],
)
def test_bad_argument_is_refused_in_one_line(arguments, named):
    with pytest.raises(ConfigError, match=named) as refusal:
        by_hand(**arguments)
    assert "\n" not in str(refusal.value)
