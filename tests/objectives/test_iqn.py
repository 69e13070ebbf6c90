"""IQNLoss: worked by hand, in closed form, and at home among TorchRL's losses."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    Categorical,
    Composite,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
)
from torchrl.envs.transforms import MultiStepTransform
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, HardUpdate, SoftUpdate, ValueEstimators

from tests.objectives.lines import Lines, actor, transitions
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.objectives import IQNLoss, quantile_huber

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

    With γ = 1 they are the same, and |δ| is 0; over pairs it is the mean distance of two draws,
    9/3 = 3. With γ = 0.9 the means are 5.05 and 5.5.
    """
    errors = {}
    for priority in ("mean", "pairwise"):
        network = actor([[1.0], [0.0]], [[9.0], [9.0]])
        loss = IQNLoss(
            network, priority=priority, online_quantiles=quantiles, target_quantiles=quantiles
        )
        loss.make_value_estimator(gamma=gamma)
        batch = from_zero_to_one().expand(4000).clone()
        torch.manual_seed(0)
        loss(batch)
        errors[priority] = batch["td_error"]
    assert errors["mean"].shape == (4000, 1)
    assert errors["mean"].median().item() == pytest.approx(5.5 - 5.05 if gamma < 1 else 0, abs=1e-3)
    if gamma == 1:
        # A mean distance has a standard deviation of 9 sqrt(1/18) = 2.1 at most: ± 0.034.
        assert errors["pairwise"].mean().item() == pytest.approx(3, abs=0.15)


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


def test_soft_and_hard_updates_move_the_target_network():
    """Both begin with a copy of the online network, which then moves by 1.

    Two soft updates go half of the way, and half of the rest; the hard one comes at the second.
    """
    base = ("module", "0", "base")
    for loss, update, moved in (
        (soft := build(), SoftUpdate(soft, tau=0.5), 0.75),
        (hard := build(), HardUpdate(hard, value_network_update_interval=1), 1.0),
    ):
        loss.value_network_params.data[base].add_(1.0)
        update.step()
        update.step()
        expected = torch.tensor(ONLINE) + moved
        assert torch.equal(loss.target_value_network_params[base], expected)


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
    assert set(names) == set(IQNLoss._AcceptedKeys.__dataclass_fields__)
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


def test_several_steps_are_discounted_as_such():
    """Three steps: 1 + ½³·4 − ½ = 1."""
    batch = from_zero_to_one()
    batch["steps_to_next_obs"] = torch.tensor([[3]])
    build()(batch)
    assert batch["td_error"].item() == 1.0


@pytest.mark.parametrize("quantiles", [4, 3])
def test_each_transition_has_its_own_span_as_torchrl_writes_it(quantiles):
    """As many transitions as target quantiles, or not: neither is taken for the other."""
    batch = transitions([0] * 4, [0] * 4, [1.0, 2.0, 1.0, 2.0], [1] * 4, [False] * 4)
    batch["steps_to_next_obs"] = torch.tensor([1, 1, 3, 3])  # [B], without a last dimension
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


def test_data_of_torchrl_s_n_step_transform_is_learnt_from_as_by_dqn():
    """Its spans have no last dimension; networks of constants give δ in closed form."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(16),
        transform=MultiStepTransform(n_steps=3, gamma=0.5),
        batch_size=8,
    )
    steps = transitions([0] * 8, [0] * 8, [float(i) for i in range(8)], [1] * 8, [False] * 8)
    buffer.extend(steps)
    batch = buffer.sample(8)
    assert batch["steps_to_next_obs"].shape == (8,)
    build(target_quantiles=8)(batch)
    reward, span = batch["next", "reward"], batch["steps_to_next_obs"].unsqueeze(-1)
    assert torch.equal(batch["td_error"], (reward + 0.5**span * 4 - 0.5).abs())


def test_loss_takes_any_number_of_batch_dimensions():
    batch = from_zero_to_one().expand(3, 2).clone()
    assert build(reduction="none")(batch)["loss"].shape == (3, 2)
    assert batch["td_error"].tolist() == [[[2.5], [2.5]]] * 3


def test_state_of_the_loss_is_restored():
    source, copy = build(), build(online=TARGET, target=ONLINE)
    copy.load_state_dict(source.state_dict())
    errors = []
    for loss in (source, copy):
        batch = from_zero_to_one()
        loss(batch)
        errors.append(batch["td_error"].item())
    assert errors[0] == errors[1] == 2.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"online_quantiles": 0}, "online_quantiles is 0"),
        ({"target_quantiles": 0}, "target_quantiles is 0"),
        ({"kappa": 0.0}, "kappa is 0.0"),
        ({"priority": "median"}, "priority is median"),
        ({"double_dqn": True, "delay_value": False}, "double_dqn is True"),
        ({"action_space": "binary"}, "action_space is binary"),
    ],
)
def test_bad_argument_is_refused_in_one_line(arguments, named):
    with pytest.raises(ConfigError, match=named) as refusal:
        IQNLoss(actor(ONLINE), **arguments)
    assert "\n" not in str(refusal.value)


def test_estimators_other_than_one_step_are_refused():
    with pytest.raises(NotImplementedError, match="IQNLoss"):
        build().make_value_estimator(ValueEstimators.TDLambda)


def learn(loss, batch, updates, learning_rate):
    optimizer = torch.optim.Adam(loss.parameters(), lr=learning_rate)
    target = SoftUpdate(loss, tau=0.2)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        optimizer.zero_grad()
        loss(batch)["loss"].backward()
        optimizer.step()
        target.step()
    return loss.value_network_params["module", "0"]


def dqn(network):
    return DQNLoss(network, action_space="categorical")


@pytest.mark.parametrize("family", [dqn, IQNLoss])
@pytest.mark.parametrize(
    ("ends", "values"), [("terminated", [0.5, 1.0]), ("truncated", [1.0, 2.0])]
)
def test_value_of_a_two_state_chain_is_its_closed_form(family, ends, values):
    """State 0 leads to state 1 for nothing; state 1 pays 1 and leads to itself, and ends there.

    With γ = ½: if it ends for good, V(1) = 1 and V(0) = γ·1 = ½. If a time limit cut it short, the
    reward would have gone on for ever: V(1) = 1/(1 − γ) = 2 and V(0) = γ·2 = 1.
    """
    loss = family(actor([[0.0], [0.0]]))
    loss.make_value_estimator(gamma=0.5)
    end = {"terminated": [False, False], ends: [False, True]}
    batch = transitions([0, 1], [0, 0], [0.0, 1.0], [1, 1], **end)
    learned = learn(loss, batch, updates=300, learning_rate=0.1)
    mean = learned["base"] + learned["slope"] / 2
    assert mean.flatten().tolist() == pytest.approx(values, abs=0.02)


def test_quantiles_of_a_coin_are_their_own_fractions():
    """A coin pays 0 or 1. Within κ = 1 the loss at z is ½ [τ (1 − z)² + (1 − τ) z²]/2.

    Its slope, −τ (1 − z) + (1 − τ) z = z − τ, vanishes at z = τ: the line with base 0, slope 1.
    """
    loss = IQNLoss(actor([[0.5]], [[0.0]]), online_quantiles=32, target_quantiles=1)
    batch = transitions([0, 0], [0, 0], [0.0, 1.0], [0, 0], [True, True])
    learned = learn(loss, batch, updates=400, learning_rate=0.1)
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


def test_example_network_of_numbers():
    """The double is what it says: Z_½(1, 0) = 3 + 2·½ = 4, and so is its mean."""
    network = Lines([[0.0], [3.0]], [[0.0], [2.0]])
    out = network(
        TensorDict({"observation": torch.ones(1, 1), "tau": torch.full((1, 1), 0.5)}, [1])
    )
    assert out["quantiles"].item() == out["action_value"].item() == 4.0
