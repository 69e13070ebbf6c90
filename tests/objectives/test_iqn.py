"""IQN: its network, its loss worked by hand and in closed form, and at home among TorchRL's."""

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import (
    Categorical,
    Composite,
    OneHot,
)
from torchrl.modules import QValueActor
from torchrl.objectives import SoftUpdate, ValueEstimators

from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.objectives import IQNLoss, QuantileNetwork, cvar, quantile_huber


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [
        # δ = target − prediction. Prediction 0: δ = 1 and −1; prediction 2: δ = −1 and −3.
        # Huber with κ = 1 gives ½, ½ and ½, 3 − ½ = 2½.
        # Weights: τ = ¼ of prediction 0 is ¼ for δ = 1 and ¾ for δ = −1; τ = ¾ of prediction 2 is
        # |¾ − 1| = ¼ for both.  Prediction 0: (¼·½ + ¾·½)/2 = ¼; prediction 2: (¼·½ + ¼·2½)/2 = ⅜.
        (1.0, 0.25 + 0.375),
        # κ = 4 keeps every δ in the square part: ½, ½ and ½, 4½, then divided by 4.
        # Prediction 0: (¼·½ + ¾·½)/2/4 = 1/16; prediction 2: (¼·½ + ¼·4½)/2/4 = 5/32.
        (4.0, 1 / 16 + 5 / 32),
    ],
)
def test_quantile_huber_is_what_it_is_by_hand(kappa, expected):
    prediction, tau = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.25, 0.75]])
    target = torch.tensor([[1.0, -1.0]])
    loss = quantile_huber(prediction, tau, target, kappa)
    assert loss.tolist() == pytest.approx([expected])


def naive(prediction, tau, target, kappa):
    """Eq. 3 of the paper, one number at a time."""
    losses = []
    for b in range(len(prediction)):
        total = 0.0
        for i in range(len(prediction[b])):
            for j in range(len(target[b])):
                delta = target[b][j] - prediction[b][i]
                if abs(delta) <= kappa:
                    huber = 0.5 * delta**2
                else:
                    huber = kappa * (abs(delta) - 0.5 * kappa)
                below = 1.0 if delta < 0 else 0.0
                total += abs(tau[b][i] - below) * huber / kappa / len(target[b])
        losses.append(total)
    return losses


@pytest.mark.parametrize("kappa", [0.1, 1.0, 3.0])
def test_quantile_huber_equals_a_naive_loop_on_random_input(kappa):
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    batch, online, targets = torch.randint(1, 9, (3,), generator=generator).tolist()
    prediction = torch.randn(batch, online, generator=generator, dtype=torch.float64)
    tau = torch.rand(batch, online, generator=generator, dtype=torch.float64)
    target = torch.randn(batch, targets, generator=generator, dtype=torch.float64)
    loss = quantile_huber(prediction, tau, target, kappa)
    expected = naive(prediction.tolist(), tau.tolist(), target.tolist(), kappa)
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_flows_into_the_prediction_alone():
    """One pair, δ = 3 beyond κ = 1: the loss falls by τ for each unit of prediction."""
    prediction, target = torch.zeros(1, 1, requires_grad=True), torch.tensor([[3.0]])
    target.requires_grad_()
    tau = torch.tensor([[0.3]], requires_grad=True)
    quantile_huber(prediction, tau, target).sum().backward()
    assert prediction.grad.item() == pytest.approx(-0.3)
    assert target.grad is None


def test_quantile_huber_takes_any_number_of_batch_dimensions():
    prediction, tau, target = torch.randn(6, 3), torch.rand(6, 3), torch.randn(6, 5)
    flat = quantile_huber(prediction, tau, target)
    shaped = quantile_huber(prediction.view(2, 3, 3), tau.view(2, 3, 3), target.view(2, 3, 5))
    assert torch.equal(shaped, flat.view(2, 3))


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
    network = by_hand(distortion=distortion)
    drawn = torch.get_rng_state()
    out = network(state())
    assert torch.equal(torch.get_rng_state(), drawn)
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


def test_distortion_that_leaves_the_fractions_is_refused():
    with pytest.raises(ConfigError, match=r"distortion\(tau\) is \[1"):
        by_hand(distortion=lambda tau: tau + 1)


class Lines(TensorDictModuleBase):
    """Z_τ(s, a) = base[s, a] + slope[s, a] τ for numbered states s, observed as float ``[B, 1]``.

    ``seen`` keeps the fractions that were handed in, call by call.
    """

    def __init__(self, base, slope=None, keys=("observation", "tau", "quantiles")):
        super().__init__()
        self.state_key, self.tau_key, self.quantiles_key = keys
        self.in_keys, self.out_keys = [self.state_key], ["action_value"]
        self.base = nn.Parameter(torch.tensor(base))
        self.slope = nn.Parameter(
            torch.zeros_like(self.base) if slope is None else torch.tensor(slope)
        )
        self.seen = []

    def forward(self, tensordict):
        state = tensordict.get(self.state_key).squeeze(-1).long()
        base, slope = self.base[state], self.slope[state]
        tau = tensordict.get(self.tau_key, None)
        if tau is not None:
            self.seen.append(tau)
            values = base.unsqueeze(-2) + slope.unsqueeze(-2) * tau.unsqueeze(-1)
            tensordict.set(self.quantiles_key, values)
        return tensordict.set("action_value", base + slope / 2)


def actor(*args, **kwargs):
    """The greedy policy over ``Lines``, actions numbered."""
    network = Lines(*args, **kwargs)
    return QValueActor(network, spec=Categorical(network.base.shape[-1]))


def transitions(state, action, reward, following, terminated, truncated=None):
    """A batch of transitions from plain lists."""
    column = {
        "observation": torch.tensor(state, dtype=torch.float32).unsqueeze(-1),
        "next": {
            "observation": torch.tensor(following, dtype=torch.float32).unsqueeze(-1),
            "reward": torch.tensor(reward, dtype=torch.float32).unsqueeze(-1),
            "terminated": torch.tensor(terminated).unsqueeze(-1),
        },
    }
    truncated = [False] * len(state) if truncated is None else truncated
    column["next"]["done"] = column["next"]["terminated"] | torch.tensor(truncated).unsqueeze(-1)
    return TensorDict({"action": torch.tensor(action), **column}, [len(state)])


# Two states, two actions. Online, action 0 is best in state 1; to the target network, action 1.
ONLINE = [[0.5, 0.0], [3.0, 1.0]]
TARGET = [[9.0, 9.0], [2.0, 4.0]]


def build(online=ONLINE, target=TARGET, gamma=0.5, **arguments):
    """A loss whose two networks hold constants."""
    loss = IQNLoss(actor(online), **arguments)
    loss.make_value_estimator(gamma=gamma)
    loss.target_value_network_params.data["module", "0", "base"].copy_(torch.tensor(target))
    return loss


def from_zero_to_one(**end):
    return transitions([0], [0], [1.0], [1], **({"terminated": [False]} | end))


@pytest.mark.parametrize(
    ("double", "end", "delta"),
    [
        # The prediction is Z(0, 0) = ½, the reward 1, γ = ½.
        # Double: the online network likes action 0 in state 1, worth 2 to the target network:
        # target 1 + ½·2 = 2. Else the target network takes its own best, 4: target 1 + ½·4 = 3.
        (True, {}, 1.5),
        (False, {}, 2.5),
        # A time limit is no end of the world: it bootstraps. A terminal state is worth nothing.
        (True, {"truncated": [True]}, 1.5),
        (True, {"terminated": [True]}, 0.5),
    ],
)
def test_loss_and_priority_are_what_they_are_by_hand(double, end, delta):
    """All pairs share one δ > 0, so |δ| is the priority and the loss is Huber(δ) Σ τ_i."""
    loss, batch = build(double_dqn=double), from_zero_to_one(**end)
    value = loss(batch)["loss"]
    prediction_tau = loss.value_network.module[0].seen[0]
    huber = delta - 0.5 if delta > 1 else delta**2 / 2
    assert value.item() == pytest.approx(huber * prediction_tau.sum().item())
    assert batch["td_error"].tolist() == [[delta]]


@pytest.mark.parametrize("quantiles", [2, 8])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_priority_is_the_distance_of_the_means_and_vanishes_once_the_return_is_learnt(
    quantiles, gamma
):
    """The next state's return is U(0, 9), so the target is U(1, 1 + 9γ); predicted is U(1, 10).

    With γ = 1 they are the same, and |δ| is 0; with γ = 0.9 the means are 5.05 and 5.5. Of
    straight quantile functions the means are exact, whichever fractions are drawn.
    """
    network = actor([[1.0], [0.0]], [[9.0], [9.0]])
    loss = IQNLoss(network, online_quantiles=quantiles, target_quantiles=quantiles)
    loss.make_value_estimator(gamma=gamma)
    batch = from_zero_to_one().expand(1000).clone()
    torch.manual_seed(0)
    loss(batch)
    assert batch["td_error"].shape == (1000, 1)
    expected = 5.5 - 5.05 if gamma < 1 else 0
    assert batch["td_error"].median().item() == pytest.approx(expected, abs=1e-3)


def test_pairwise_priority_is_the_mean_absolute_error_over_pairs():
    """Online quantiles are τ, the target's are 1 + γ τ′ = 1 + τ′/2: the mean of |1 + τ′/2 − τ|."""
    network = actor([[0.0], [0.0]], [[1.0], [1.0]])
    loss = IQNLoss(network, priority="pairwise", online_quantiles=3, target_quantiles=5)
    loss.make_value_estimator(gamma=0.5)
    batch = from_zero_to_one()
    loss(batch)
    tau, following = (seen.tolist()[0] for seen in loss.value_network.module[0].seen)
    pairs = [abs(1 + other / 2 - one) for one in tau for other in following]
    assert len(pairs) == 15
    assert batch["td_error"].item() == pytest.approx(sum(pairs) / 15)


def test_fractions_are_drawn_anew_for_each_transition_and_call():
    loss = build(online_quantiles=4, target_quantiles=6)
    batch = from_zero_to_one().expand(5).clone()
    for _ in range(2):
        loss(batch)
    seen = loss.value_network.module[0].seen
    assert [tuple(tau.shape) for tau in seen] == [(5, 4), (5, 6)] * 2
    drawn = torch.cat([tau.flatten() for tau in seen])
    assert len(drawn.unique()) == len(drawn) == 2 * 5 * 10
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_gradient_reaches_the_taken_action_of_the_online_network_and_nothing_else():
    """Neither the target network, nor the choice of the next action, nor the next state's value."""
    loss = build(double_dqn=True)
    loss(from_zero_to_one())["loss"].backward()
    gradients = loss.value_network_params["module", "0", "base"].grad
    assert gradients[0, 0] < 0  # the prediction is too low
    assert gradients.count_nonzero() == 1
    for parameter in loss.target_value_network_params.values(True, True):
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert {id(p) for p in loss.parameters()} == {
        id(p) for p in loss.value_network_params.values(True, True)
    }


def test_without_a_target_network_the_online_one_bootstraps_and_gets_no_gradient_from_it():
    """Target: 1 + ½·max(3, 1) = 2½, so δ = 2."""
    loss = IQNLoss(actor(ONLINE), delay_value=False)
    loss.make_value_estimator(gamma=0.5)
    batch = from_zero_to_one()
    loss(batch)["loss"].backward()
    assert batch["td_error"].item() == 2.0
    assert loss.value_network_params["module", "0", "base"].grad[1].count_nonzero() == 0


def test_reductions_and_weights_are_those_of_the_siblings():
    """As in DQNLoss the weighted mean is Σ w l / Σ w."""
    batch = transitions([0, 0, 1], [0, 1, 1], [1.0, 0.0, 5.0], [1, 1, 0], [False] * 3)
    weights = torch.tensor([1.0, 0.5, 0.25])

    def loss(reduction, batch, **arguments):
        torch.manual_seed(0)
        return build(reduction=reduction, **arguments)(batch)["loss"]

    each = loss("none", batch.clone())
    assert each.shape == (3,)
    assert loss("sum", batch.clone()).item() == pytest.approx(each.sum().item())
    assert loss("mean", batch.clone()).item() == pytest.approx(each.mean().item())
    assert loss(None, batch.clone()).item() == pytest.approx(each.mean().item())
    batch["priority_weight"] = weights
    weighted = (weights * each).sum() / weights.sum()
    assert loss("mean", batch.clone()).item() == pytest.approx(weighted.item())
    unweighted = loss("mean", batch.clone(), use_prioritized_weights=False)
    assert unweighted.item() == pytest.approx(each.mean().item())


def test_every_key_can_be_renamed_and_nothing_else_is_written():
    network = Lines(ONLINE, keys=("state", "fraction", "values"))
    act = ("agent", "action")
    spec = Composite(agent=Composite(action=OneHot(2)))
    renamed = IQNLoss(QValueActor(network, spec=spec, action_key=act))
    renamed.make_value_estimator(gamma=0.5)
    names = {
        "action": act,
        "tau": "fraction",
        "quantiles": "values",
        "priority": "surprise",
        "reward": "gain",
        "done": "over",
        "terminated": "dead",
        "priority_weight": "weight",
    }
    written_by_the_estimator = {"advantage", "value_target", "value", "action_value"}
    assert set(names) == set(IQNLoss._AcceptedKeys.__dataclass_fields__) - written_by_the_estimator
    renamed.set_keys(**names)
    plain = from_zero_to_one()
    batch = plain.select("next", "observation")
    batch.rename_key_("observation", "state")
    for old, new in {"observation": "state", "reward": "gain", "done": "over"}.items():
        batch.rename_key_(("next", old), ("next", new))
    batch.rename_key_(("next", "terminated"), ("next", "dead"))
    batch[act], batch["weight"] = torch.tensor([[True, False]]), torch.ones(1)
    before = set(batch.keys(True, True))
    renamed(batch)
    # 1 + ½·3 − ½ = 2: the target network is a copy of the online one here.
    assert batch["surprise"].item() == 2.0
    assert set(batch.keys(True, True)) - before == {"surprise"}
    assert set(renamed.in_keys) == before - {"weight"}


@pytest.mark.parametrize("form", ["numbers", "column", "one-hot"])
def test_actions_may_be_numbers_columns_or_one_hot(form):
    """State 0, action 1: 1 + ½·3 − 0 = 2½. State 1, action 0, terminal: 2 − 3 = −1."""
    batch = transitions([0, 1], [1, 0], [1.0, 2.0], [1, 0], [False, True])
    spec = OneHot(2) if form == "one-hot" else Categorical(2)
    if form == "column":
        batch["action"] = batch["action"].unsqueeze(-1)
    if form == "one-hot":
        batch["action"] = nn.functional.one_hot(batch["action"], 2)
    loss = IQNLoss(QValueActor(Lines(ONLINE), spec=spec))
    loss.make_value_estimator(gamma=0.5)
    loss(batch)
    assert batch["td_error"].flatten().tolist() == [2.5, 1.0]


def test_keyword_arguments_do_as_well_as_a_tensordict():
    batch = from_zero_to_one()
    torch.manual_seed(0)
    expected = build()(batch.clone())["loss"]
    torch.manual_seed(0)
    entries = {
        "_".join(key) if isinstance(key, tuple) else key: batch[key] for key in build().in_keys
    }
    assert "next_terminated" in entries
    assert torch.equal(build()(**entries), expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("quantiles", [4, 3])
def test_each_transition_has_its_own_span_as_torchrl_writes_it(quantiles, shape):
    """As many transitions as target quantiles, or not: neither is taken for the other."""
    batch = transitions([0] * 4, [0] * 4, [1.0, 2.0, 1.0, 2.0], [1] * 4, [False] * 4)
    batch["steps_to_next_obs"] = torch.tensor([1, 1, 3, 3]).reshape(shape)
    build(target_quantiles=quantiles)(batch)
    # reward + ½^span · 4 − ½
    assert batch["td_error"].flatten().tolist() == [2.5, 3.5, 1.0, 2.0]


def test_reward_and_ends_without_a_last_dimension_are_each_transition_s_own():
    batch = transitions([0] * 4, [0] * 4, [1.0, 2.0, 1.0, 2.0], [1] * 4, [False, True] * 2)
    flat = batch.clone()
    for key in ("reward", "done", "terminated"):
        flat["next", key] = flat["next", key].squeeze(-1)
    for each in (batch, flat):
        build(target_quantiles=4)(each)
        assert each["td_error"].flatten().tolist() == [2.5, 1.5, 2.5, 1.5]


def test_loss_takes_any_number_of_batch_dimensions():
    batch = from_zero_to_one().expand(3, 2).clone()
    assert build(reduction="none")(batch)["loss"].shape == (3, 2)
    assert batch["td_error"].tolist() == [[[2.5], [2.5]]] * 3


def test_what_the_loss_cannot_do_is_refused():
    with pytest.raises(NotImplementedError, match="IQNLoss"):
        build().make_value_estimator(ValueEstimators.TDLambda)
    with pytest.raises(ValueError, match="requires delay_value=True"):
        IQNLoss(actor(ONLINE), double_dqn=True, delay_value=False)


def learn(loss, batch, updates, learning_rate):
    optimizer = torch.optim.Adam(loss.parameters(), lr=learning_rate)
    target = SoftUpdate(loss, tau=0.5)
    torch.manual_seed(0)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        optimizer.zero_grad()
        loss(batch)["loss"].backward()
        optimizer.step()
        target.step()
    return loss.value_network_params["module", "0"]


@pytest.mark.parametrize(
    ("ends", "values"), [("terminated", [0.5, 1.0]), ("truncated", [1.0, 2.0])]
)
def test_value_of_a_two_state_chain_is_its_closed_form(ends, values):
    """State 0 leads to state 1 for nothing; state 1 pays 1 and leads to itself, and ends there.

    With γ = ½: if it ends for good, V(1) = 1 and V(0) = γ·1 = ½. If a time limit cut it short, the
    reward would have gone on for ever: V(1) = 1/(1 − γ) = 2 and V(0) = γ·2 = 1.
    """
    loss = IQNLoss(actor([[0.0], [0.0]]))
    loss.make_value_estimator(gamma=0.5)
    end = {"terminated": [False, False], ends: [False, True]}
    batch = transitions([0, 1], [0, 0], [0.0, 1.0], [1, 1], **end)
    learned = learn(loss, batch, updates=150, learning_rate=0.2)
    mean = learned["base"] + learned["slope"] / 2
    assert mean.flatten().tolist() == pytest.approx(values, abs=0.03)


def test_quantiles_of_a_coin_are_their_own_fractions():
    """A coin pays 0 or 1. Within κ = 1 the loss at z is ½ [τ (1 − z)² + (1 − τ) z²]/2.

    Its slope, −τ (1 − z) + (1 − τ) z = z − τ, vanishes at z = τ: the line with base 0, slope 1.
    """
    loss = IQNLoss(actor([[0.5]], [[0.0]]), online_quantiles=32, target_quantiles=1)
    batch = transitions([0, 0], [0, 0], [0.0, 1.0], [0, 0], [True, True])
    learned = learn(loss, batch, updates=150, learning_rate=0.2)
    assert learned["base"].item() == pytest.approx(0, abs=0.03)
    assert learned["slope"].item() == pytest.approx(1, abs=0.05)


def test_loss_is_the_quantile_huber_loss_of_its_parts():
    """Random lines: prediction and target are computed here from the fractions that were drawn."""
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    torch.manual_seed(seed)
    base, slope = torch.randn(3, 2), torch.randn(3, 2)
    loss = IQNLoss(actor(base.tolist(), slope.tolist()), reduction="none", kappa=0.7)
    loss.make_value_estimator(gamma=0.9)
    batch = transitions(
        torch.randint(3, (16,)).tolist(),
        torch.randint(2, (16,)).tolist(),
        torch.randn(16).tolist(),
        torch.randint(3, (16,)).tolist(),
        (torch.rand(16) < 0.5).tolist(),
    )
    value = loss(batch)["loss"]
    tau, following = loss.value_network.module[0].seen
    state, other = (data["observation"].squeeze(-1).long() for data in (batch, batch["next"]))
    best = (base + slope / 2)[other].argmax(-1)
    prediction = base[state, batch["action"], None] + slope[state, batch["action"], None] * tau
    future = base[other, best, None] + slope[other, best, None] * following
    target = batch["next", "reward"] + 0.9 * ~batch["next", "terminated"] * future
    torch.testing.assert_close(value, quantile_huber(prediction, tau, target, 0.7))
