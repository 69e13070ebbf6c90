"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905), with any replay method.

python -m recipes.sac --config recipes/configs/scene_task1/sac.yaml
fabric run --devices=2 --strategy=ddp_find_unused_parameters_true recipes/sac.py --config …
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
from torchrl.modules import EGreedyModule, ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate, ValueEstimators

from recipes.arguments import (
    FiniteFloat,
    LeftOpenUnitInterval,
    PositiveFinite,
    PositiveFloat,
    PositiveInt,
    RightOpenUnitInterval,
    Width,
)
from recipes.networks import (
    ActionValue,
    GaussianPolicy,
    critics_values,
    keep_targets,
    value_figures,
    vector_sizes,
)
from recipes.transitions import Transitions
from vlmrb_torchrl import keys


class SAC(L.LightningModule):
    """Soft actor-critic with twin critics and a temperature that is learnt.

    Args:
        env: Environment whose specs the networks are built for; actions in [-1, 1].
        hidden_features: Width of each hidden layer, of the actor and of each critic.
        num_critics: Critics; the target is the least of theirs.
        critic_layer_norm: Normalise the critics' hidden layers (not in the paper).
        gamma: Discount factor.
        n_steps: Steps of reward that a transition carries before the value is bootstrapped.
        reward_scale: Factor of the rewards that are learnt from.
        learning_rate: Step size of Adam, for critics, actor and temperature.
        target_update_rate: Polyak rate τ: target ← (1-τ) target + τ online, each update.
        gradient_clip_norm: Largest norm of each optimizer's gradient; .inf as in the paper.
        alpha_init: Temperature at the start.
        target_entropy: Entropy that the temperature steers to, in nats; null: -1 per number of an
            action, as in the paper.
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
        alpha_init: PositiveFinite = 1.0,
        target_entropy: FiniteFloat | None = None,
    ) -> None:
        super().__init__()
        sizes = vector_sizes(env)
        action_spec = env.action_spec_unbatched
        self.policy = ProbabilisticActor(
            GaussianPolicy(*sizes, hidden_features),
            in_keys=["loc", "scale"],
            spec=action_spec,
            distribution_class=TanhNormal,
        )
        self.warmup = EGreedyModule(action_spec)
        self.loss = SACLoss(
            self.policy,
            ActionValue(*sizes, hidden_features, critic_layer_norm),
            num_qvalue_nets=num_critics,
            loss_function="l2",
            alpha_init=alpha_init,
            action_spec=action_spec,
            target_entropy="auto" if target_entropy is None else target_entropy,
        )
        self.loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
        keep_targets(self.loss)
        _ = self.loss.target_entropy  # a buffer made when first asked for; checkpoints hold it
        self.transitions = Transitions(gamma, n_steps, reward_scale)
        self.target = SoftUpdate(self.loss, tau=target_update_rate)
        self.learning_rate, self.gradient_clip_norm = learning_rate, gradient_clip_norm

    @property
    def behaviour(self) -> TensorDictModule:
        """The policy that collects: draws of the policy, uniform ones before the first update."""
        return TensorDictSequential(self.policy, self.warmup)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build Adam over the critics, the actor and the logarithm of the temperature."""
        parameters = {
            "critic": self.loss.qvalue_network_params.parameters(),
            "actor": self.loss.actor_network_params.parameters(),
            "temperature": [self.loss.log_alpha],
        }
        return {
            name: Adam(chosen, lr=self.learning_rate, fused=True)
            for name, chosen in parameters.items()
        }

    def compile_losses(self, **options: Any) -> None:
        """Compile the critics' loss and the actor's by ``torch.compile``, with its options."""
        self.loss.qvalue_v2_loss = torch.compile(self.loss.qvalue_v2_loss, **options)
        self.loss.actor_loss = torch.compile(self.loss.actor_loss, **options)

    def training_step(self, batch: TensorDictBase, optimizer: str) -> Tensor:
        """Compute a loss of a batch; the critics' writes |δ| into it, the actor's log π."""
        loss: Tensor
        if optimizer == "critic":
            loss, metadata = self.loss.qvalue_v2_loss(batch)
            batch.set(keys.TD_ERROR, metadata["td_error"])  # |δ|, the larger of the critics'
        elif optimizer == "actor":
            # Importance weights are the critics' alone.
            loss, metadata = self.loss.actor_loss(batch.exclude(keys.WEIGHT))
            batch.set("log_prob", metadata["log_prob"])
        else:
            loss = self.loss.alpha_loss(batch.get("log_prob")).mean()
        return loss

    def after_update(self) -> None:
        """Move the target critics towards the online ones."""
        self.target.step()

    def after_collection(self, progress: float) -> None:
        """End the uniform actions of the warm-up."""
        self.warmup.eps.zero_()

    @torch.no_grad()
    def figures(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Say what is worth logging after an update."""
        return {
            **value_figures(self.loss, critics_values(self.loss, batch)),
            "train/entropy": -batch["log_prob"].mean(),
            "train/alpha": self.loss.log_alpha.exp(),
        }


if __name__ == "__main__":
    from recipes.running.cli import run

    run(SAC)
