"""TD3 (Fujimoto et al. 2018, arXiv 1802.09477), with any replay method.

python -m recipes.td3 --config tests/recipes/configs/pendulum/td3.yaml
fabric run --devices=2 --strategy=ddp_find_unused_parameters_true recipes/td3.py --config …
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchrl.envs import EnvBase
from torchrl.modules import AdditiveGaussianModule, EGreedyModule
from torchrl.objectives import SoftUpdate, TD3Loss, ValueEstimators

from recipes.arguments import (
    LeftOpenUnitInterval,
    NonNegativeFinite,
    PositiveFinite,
    PositiveFloat,
    PositiveInt,
    RightOpenUnitInterval,
    Width,
)
from recipes.networks import (
    ActionValue,
    DeterministicPolicy,
    critics_values,
    keep_targets,
    value_figures,
    vector_sizes,
)
from recipes.transitions import Transitions
from vlmrb_torchrl import keys


class TD3(L.LightningModule):
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
        self.warmup = EGreedyModule(action_spec)
        self.loss = TD3Loss(
            self.policy,
            ActionValue(*sizes, hidden_features, critic_layer_norm),
            num_qvalue_nets=num_critics,
            loss_function="l2",
            action_spec=action_spec,
            policy_noise=target_noise,
            noise_clip=target_noise_clip,
        )
        self.loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
        keep_targets(self.loss)
        self.transitions = Transitions(gamma, n_steps, reward_scale)
        self.target = SoftUpdate(self.loss, tau=target_update_rate)
        self.learning_rate, self.gradient_clip_norm = learning_rate, gradient_clip_norm
        self.policy_delay, self.updates = policy_delay, 0

    counts = ("updates",)
    """What checkpoints hold beside the weights: by them the actor's turns are counted."""

    @property
    def behaviour(self) -> TensorDictModule:
        """The policy that collects: with noise; uniform actions before the first update."""
        return TensorDictSequential(self.policy, self.noise, self.warmup)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build Adam over the critics and over the actor."""
        parameters = {
            "critic": self.loss.qvalue_network_params.parameters(),
            "actor": self.loss.actor_network_params.parameters(),
        }
        return {
            name: Adam(chosen, lr=self.learning_rate, fused=True)
            for name, chosen in parameters.items()
        }

    @property
    def actor_is_due(self) -> bool:
        """Whether actor and targets move in this update."""
        return self.updates % self.policy_delay == 0

    def compile_losses(self, **options: Any) -> None:
        """Compile the critics' loss and the actor's by ``torch.compile``, with its options."""
        self.loss.value_loss = torch.compile(self.loss.value_loss, **options)
        self.loss.actor_loss = torch.compile(self.loss.actor_loss, **options)

    def training_step(self, batch: TensorDictBase, optimizer: str) -> Tensor | None:
        """Compute a loss of a batch; the critics' writes |δ| into it."""
        loss: Tensor
        if optimizer == "critic":
            loss, metadata = self.loss.value_loss(batch)
            # TD3Loss knows δ² of each critic; replay priorities are in units of return.
            batch.set(keys.TD_ERROR, metadata["td_error"].detach().amax(0).sqrt())
            return loss
        if not self.actor_is_due:
            return None
        loss, _ = self.loss.actor_loss(batch.exclude(keys.WEIGHT))  # weights are the critics' alone
        return loss

    def after_update(self) -> None:
        """Move the target networks towards the online ones, as seldom as the actor."""
        if self.actor_is_due:
            self.target.step()
        self.updates += 1

    def after_collection(self, progress: float) -> None:
        """End the uniform actions of the warm-up."""
        self.warmup.eps.zero_()

    @torch.no_grad()
    def figures(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Say what is worth logging after an update."""
        return value_figures(self.loss, critics_values(self.loss, batch))


if __name__ == "__main__":
    from recipes.running.cli import run

    run(TD3)
