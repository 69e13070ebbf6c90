"""SAC and TD3: what each step trains, how actions are explored, what is refused."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3
from tests.recipes import chain
from tests.recipes.chain import ChainEnv, learner

BOTH = pytest.mark.parametrize("algorithm", [SAC, TD3])


def module(algorithm, **arguments):
    torch.manual_seed(0)
    return learner(algorithm, **arguments)


def batch(size=4):
    return chain.batch(discrete=False, size=size).exclude("priority_weight", "steps_to_next_obs")


def copied(network):
    return [weight.detach().clone() for weight in network.parameters()]


def unchanged(network, before):
    return all(map(torch.equal, network.parameters(), before))


def own_log_prob(trained, observed):
    """Log π of an action drawn by SAC's policy: a Gaussian's, less the tanh's log slope."""
    policy = trained.policy[0](observed)
    loc, scale = policy["loc"], policy["scale"]
    raw = loc + scale * torch.randn(loc.shape)
    log_prob = torch.distributions.Normal(loc, scale).log_prob(raw) - (1 - raw.tanh() ** 2).log()
    return log_prob.flatten().detach()


@BOTH
def test_each_trained_weight_has_one_optimizer(algorithm):
    trained = module(algorithm)
    groups = [
        group
        for optimizer in trained.configure_optimizers().values()
        for group in optimizer.param_groups
    ]
    stepped = [id(weight) for group in groups for weight in group["params"]]
    learnt = [id(weight) for weight in trained.parameters() if weight.requires_grad]
    assert sorted(stepped) == sorted(learnt)


@BOTH
def test_a_step_changes_the_weights_of_its_own_optimizer_alone(algorithm):
    """An actor's loss goes through the critics: without their own step they stay."""
    trained = module(algorithm)
    step, kept = trained.step, []
    trained.step = lambda gradient: (
        step(gradient) if gradient.optimizer == "actor" else kept.append(gradient.optimizer) or {}
    )
    policy = trained.policy
    before = copied(policy), copied(trained.critics)
    trained.update(batch())
    assert "critic" in kept
    assert not unchanged(policy, before[0])
    assert unchanged(trained.critics, before[1])
    assert all(weight.grad is None for weight in trained.critics.parameters())


@BOTH
def test_importance_weights_weight_the_critics_and_not_the_actor(algorithm):
    """With one critic its loss is Σ w δ² / Σ w."""
    actor_loss = []
    for weight in (torch.ones(4), torch.tensor([0.1, 1.0, 0.5, 0.2])):
        trained, drawn = module(algorithm, num_critics=1, learning_rate=0.0), batch()
        torch.manual_seed(1)
        td_error, figures = trained.update(drawn.set("priority_weight", weight))
        expected = (weight * td_error**2).sum() / weight.sum()
        assert figures["loss/critic"].item() == pytest.approx(expected.item())
        actor_loss.append(figures["loss/actor"].item())
    assert actor_loss[0] == actor_loss[1]


@BOTH
def test_target_critics_follow_by_the_polyak_rate(algorithm):
    trained = module(algorithm, target_update_rate=0.25, learning_rate=0.0)
    for network, value in ((trained.critics, 5.0), (trained.target, 1.0)):
        for weight in network.parameters():
            weight.data.fill_(value)
    trained.update(batch())
    assert all((weight == 2.0).all() for weight in trained.target.parameters())


def test_td3_moves_actor_and_targets_once_in_policy_delay_updates():
    trained = module(TD3, policy_delay=3)
    moving = trained.policy, trained.target, trained.target_policy
    stepped, moved = [], []
    for _ in range(7):
        before = [copied(network) for network in moving]
        _, figures = getattr(trained, trained.next_update())(batch())
        stepped.append("loss/actor" in figures)
        moved.append([not unchanged(*pair) for pair in zip(moving, before, strict=True)])
    due = [True, False, False] * 2 + [True]
    assert stepped == due
    assert moved == [[is_due] * 3 for is_due in due]


def test_td3_target_actions_are_smoothed_by_clipped_noise():
    """Target critics say Q(s, a) = a, the target actor 0, the critics 0, and γ is 0.5.

    Noise of 1000 is always clipped, to ±0.3: |δ| is 0.5 x 0.3.
    """
    trained = module(TD3, hidden_features=(), gamma=0.5, target_noise=1e3, target_noise_clip=0.3)
    for network in (trained.critics, trained.target, trained.target_policy):
        for weight in network.parameters():
            weight.data.zero_()
    for critic in trained.target:
        critic[0].weight.data[..., -1] = 1.0
    drawn = batch(64)
    drawn["next", "reward"].zero_()
    drawn["next", "terminated"].zero_()
    td_error, _ = trained.update_critics(drawn)
    assert td_error.tolist() == pytest.approx([0.15] * 64)


def test_sac_temperature_follows_the_entropy_of_the_actor_s_own_actions():
    """Its loss is -log α (log π + target); it rises below the target entropy and falls above."""
    for target, sign in ((50.0, 1), (-50.0, -1)):
        trained, drawn = module(SAC, target_entropy=target, alpha_init=0.2), batch(64)
        torch.manual_seed(3)
        trained.actor.draw(drawn["next", "observation"])  # as the critics' target does
        log_prob = own_log_prob(trained, drawn.clone())
        torch.manual_seed(3)
        _, figures = trained.update(drawn)
        entropy = -log_prob.mean().item()
        assert figures["train/entropy"].item() == pytest.approx(entropy, rel=1e-4)
        expected = -math.log(0.2) * (target - entropy)
        assert figures["loss/temperature"].item() == pytest.approx(expected, rel=1e-4)
        assert sign * (trained.log_alpha.exp().item() - 0.2) > 0


@pytest.mark.parametrize("numbers", [1, 3])
def test_sac_target_entropy_is_minus_one_per_number_of_an_action(numbers):
    env = ChainEnv(2, discrete=False)
    env.action_spec = Bounded(-1, 1, (2, numbers), dtype=torch.float32)
    assert SAC(env, hidden_features=(8,)).target_entropy == -numbers


def test_sac_values_the_entropy_of_what_it_would_do_next():
    """Critics say 0, γ is 0.5 and α 2: δ is -0.5 x -2 log π(a'|s'), with a' drawn anew."""
    trained = module(SAC, gamma=0.5, alpha_init=2.0)
    for network in (trained.critics, trained.target):
        for weight in network.parameters():
            weight.data.zero_()
    drawn = batch()
    drawn["next", "reward"].zero_()
    drawn["next", "terminated"].zero_()
    torch.manual_seed(3)
    log_prob = own_log_prob(trained, drawn["next"].clone())
    torch.manual_seed(3)
    td_error, _ = trained.update(drawn)
    assert td_error.tolist() == pytest.approx(log_prob.abs().tolist(), rel=1e-4)


@BOTH
def test_collected_actions_are_the_policy_s_draws_or_noisy(algorithm):
    trained = module(algorithm)
    if algorithm is SAC:  # whose draws are not about 0 then
        trained.actor.mlp[-1].bias.data[0] = 1.0
    state = TensorDict({"observation": torch.zeros(4000, 2)}, [4000])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        action = trained.behaviour(state.clone())["action"]
    if algorithm is TD3:  # the policy's action and noise of 0.1, whose estimate is 0.1 ± 0.0011
        assert action.std().item() == pytest.approx(0.1, abs=0.006)
        assert action.abs().max() <= 1
    else:  # the tanh of a normal draw; estimates of mean 0 ± 0.016 and deviation 1 ± 0.011
        policy = trained.policy[0](state[:1].clone())
        normal = (action.atanh() - policy["loc"]) / policy["scale"]
        assert normal.mean().item() == pytest.approx(0, abs=0.08)
        assert normal.std().item() == pytest.approx(1, abs=0.06)


@BOTH
def test_policy_without_exploration_gives_the_same_action_again(algorithm):
    trained = module(algorithm)
    state = TensorDict({"observation": torch.randn(16, 2)}, [16])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        first, again = (trained.policy(state.clone())["action"] for _ in range(2))
    assert first.tolist() == again.tolist()
    if algorithm is SAC:
        assert torch.allclose(first, trained.policy[0](state.clone())["loc"].tanh())


@BOTH
def test_layer_norm_is_the_critics_alone(algorithm):
    trained = module(algorithm, critic_layer_norm=True)
    # in 3 x 8 + 8, norm 8 + 8, out 8 + 1, of two critics
    assert sum(w.numel() for w in trained.critics.parameters()) == 2 * 57


REFUSED = {
    "--env.discrete=true": ("action_spec", "Categorical", "choose another env"),
    "--replay=VLMGuided": ("Chain", "renderer", "--replay Uniform"),
}


@pytest.mark.parametrize("argument", REFUSED)
@BOTH
def test_impossible_combination_is_refused_in_one_line(algorithm, argument, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("something was launched"))
    chain = ["--env=tests.recipes.chain.Chain", "--replay=Uniform"]
    with pytest.raises(SystemExit) as refusal:
        cli.run(algorithm, [*chain, argument, f"--training.log_dir={tmp_path}"])
    text = str(refusal.value)
    assert "\n" not in text
    for part in REFUSED[argument]:
        assert part in text


@pytest.mark.parametrize(
    ("observed", "acted", "remedy"),
    [
        (torch.float64, 1.0, "DoubleToFloat"),
        (torch.float32, 2.0, "ActionScaling"),
    ],
)
@BOTH
def test_environment_of_other_numbers_is_refused_with_the_transform_that_helps(
    algorithm, observed, acted, remedy
):
    env = ChainEnv(2, discrete=False)
    env.observation_spec = Composite({"observation": Unbounded((2, 2), dtype=observed)}, shape=(2,))
    env.action_spec = Bounded(-acted, acted, (2, 1), dtype=torch.float32)
    with pytest.raises(ValueError, match=remedy):
        algorithm(env)


@pytest.mark.parametrize("algorithm", [DQN, IQN])
def test_grid_algorithm_refuses_continuous_actions_in_one_line(algorithm, tmp_path):
    with pytest.raises(SystemExit, match=r"BoundedContinuous.*choose another env") as refusal:
        cli.run(algorithm, ["--env=tests.recipes.chain.Chain", "--replay=Uniform"])
    assert "\n" not in str(refusal.value)
