"""TD3 (Fujimoto et al. 2018, arXiv 1802.09477), with any replay method.

python -m recipes.td3 --config tests/recipes/configs/pendulum/td3.yaml
fabric run --devices=2 recipes/td3.py --config recipes/configs/scene_task1/td3.yaml
"""

from __future__ import annotations

import math
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.optim import Optimizer
from torchrl.envs import EnvBase
from torchrl.modules import AdditiveGaussianModule

from recipes.arguments import (
    LeftOpenUnitInterval,
    NonNegativeFinite,
    PositiveFinite,
    PositiveFloat,
    PositiveInt,
    RightOpenUnitInterval,
    Width,
)
from recipes.learning import (
    Algorithm,
    Learnt,
    adam,
    largest_error,
    mean_square,
    target_of,
    track,
    value_figures,
    weighted_mean,
)
from recipes.networks import Critics, DeterministicPolicy, vector_sizes
from recipes.transitions import Transitions


class TD3(Algorithm):
    """Twin delayed DDPG: smoothed targets of the lesser critic, an actor that learns more seldom.

    Args:
        env: Environment whose specs the networks are built for; actions in [-1, 1].
        hidden_features: Width of each hidden layer, of the actor and of each critic.
        num_critics: Critics; the target is the least of theirs.
        critic_layer_norm: Normalise the critics' hidden layers (not in the paper).
        gamma: Discount factor.
        n_steps: Steps of reward that a transition carries before the value is bootstrapped.
        reward_scale: Factor of the rewards that are learnt from.
        learning_rate: Step size of Adam, for critics and actor.
        target_update_rate: Polyak rate τ: target ← (1-τ) target + τ online, each actor's step.
        gradient_clip_norm: Largest norm of each optimizer's gradient; .inf as in the paper.
        policy_delay: Updates of the critics for one of the actor and of the targets.
        target_noise: Standard deviation of the noise that smooths the target's actions.
        target_noise_clip: Largest size of that noise.
        exploration_noise: Standard deviation of the noise on the actions that collect.
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        hidden_features: tuple[Width, ...] = (256, 256),
        num_critics: PositiveInt = 2,
        critic_layer_norm: bool = False,
        gamma: RightOpenUnitInterval = 0.99,
        n_steps: PositiveInt = 1,
        reward_scale: PositiveFinite = 1.0,
        learning_rate: PositiveFinite = 3e-4,
        target_update_rate: LeftOpenUnitInterval = 0.005,
        gradient_clip_norm: PositiveFloat = math.inf,
        policy_delay: PositiveInt = 2,
        target_noise: NonNegativeFinite = 0.2,
        target_noise_clip: NonNegativeFinite = 0.5,
        exploration_noise: NonNegativeFinite = 0.1,
    ) -> None:
        super().__init__()
        sizes = vector_sizes(env)
        action_spec = env.action_spec_unbatched
        self.policy = DeterministicPolicy(*sizes, hidden_features)
        self.noise = AdditiveGaussianModule(
            action_spec, sigma_init=exploration_noise, sigma_end=exploration_noise
        )
        self.critics = Critics(num_critics, *sizes, hidden_features, critic_layer_norm)
        self.target, self.target_policy = target_of(self.critics), target_of(self.policy)
        self.target_noise, self.target_noise_clip = target_noise, target_noise_clip
        self.transitions = Transitions(gamma, n_steps, reward_scale)
        self.target_update_rate = target_update_rate
        self.learning_rate, self.gradient_clip_norm = learning_rate, gradient_clip_norm
        self.policy_delay, self.updates = policy_delay, 0

    counts = ("updates",)
    """What checkpoints hold beside the weights: by them the actor's turns are counted."""

    @property
    def behaviour(self) -> TensorDictModule:
        """The policy that collects: with noise."""
        return TensorDictSequential(self.policy, self.noise)

    def value(self, observation: Tensor) -> Tensor:
        """Least value, over the critics, of the policy's action, ``[B]``."""
        values: Tensor = self.critics(observation, self.policy.act(observation)).amin(-1)
        return values

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build Adam over the critics and over the actor."""
        weights = {"critic": self.critics.parameters(), "actor": self.policy.parameters()}
        return {name: adam(chosen, self.learning_rate) for name, chosen in weights.items()}

    def next_update(self) -> str:
        """Say whether actor and targets move in this update, too."""
        due = self.updates % self.policy_delay == 0
        self.updates += 1
        return "update" if due else "update_critics"

    @torch.no_grad()
    def targets(self, batch: TensorDictBase) -> Tensor:
        """Where values should lie, ``[B]``, with the target policy's action and noise on it."""
        following = batch["next", "observation"]
        noise = self.target_noise * torch.randn_like(batch["action"])
        noise = noise.clamp(-self.target_noise_clip, self.target_noise_clip)
        smoothed = (self.target_policy.act(following) + noise).clamp(-1, 1)
        return self.transitions.targets(batch, self.target(following, smoothed).amin(-1))

    @torch.no_grad()
    def td_error(self, batch: TensorDictBase) -> Tensor:
        """|δ| of a batch, the larger of the critics', ``[B]``."""
        values = self.critics(batch["observation"], batch["action"])
        return largest_error(values, self.targets(batch))

    def update_critics(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch: the critics alone."""
        pair = batch["observation"], batch["action"]
        values, target = self.critics(*pair), self.targets(batch)
        errors, td_error = values - target.unsqueeze(-1), largest_error(values, target)
        signal = self.signalled(
            td_error, partial(mean_square, target=target), values, lambda: self.target(*pair)
        )
        figures = value_figures(values, target, td_error)
        loss = weighted_mean(errors.square().sum(-1), batch)
        return signal, figures | self.step(self.gradient("critic", loss))

    def update(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch: the critics, then the actor by the first of them, then targets."""
        signal, figures = self.update_critics(batch)
        observation = batch["observation"]
        pair = torch.cat([observation, self.policy.act(observation)], dim=-1)
        loss = -self.critics[0](pair).mean()  # importance weights are the critics' alone
        figures |= self.step(self.gradient("actor", loss))
        track(self.target, self.critics, self.target_update_rate)
        track(self.target_policy, self.policy, self.target_update_rate)
        return signal, figures


if __name__ == "__main__":
    from recipes.running.cli import run

    run(TD3)
