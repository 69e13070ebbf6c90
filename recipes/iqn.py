"""IQN (Dabney et al. 2018, arXiv 1806.06923), with any replay method.

python -m recipes.iqn --config recipes/configs/doorkey_6x6/iqn.yaml
fabric run --devices=2 recipes/iqn.py --config recipes/configs/doorkey_6x6/iqn.yaml
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchrl.envs import EnvBase
from torchrl.modules import EGreedyModule, QValueActor
from torchrl.objectives import SoftUpdate, ValueEstimators

from recipes.arguments import (
    ClosedUnitInterval,
    LeftOpenUnitInterval,
    PositiveFinite,
    PositiveFloat,
    PositiveInt,
    RightOpenUnitInterval,
    Width,
)
from recipes.networks import GridQuantileNetwork, grid_sizes, keep_targets, value_figures
from recipes.settings import linear
from recipes.transitions import Transitions
from vlmrb_torchrl.objectives import IQNLoss


class IQN(L.LightningModule):
    """Implicit quantile networks with a soft target network and ε-greedy exploration.

    Args:
        env: Environment whose specs the networks are built for.
        hidden_features: Width of each hidden layer.
        online_quantiles: Fractions drawn for the prediction of a transition, the paper's N. 8 do
            for small tasks (Tianshou's tests); for Atari Dopamine takes 64.
        target_quantiles: Fractions drawn for its target, the paper's N'.
        policy_quantiles: Fractions that an action is chosen by, the paper's K.
        kappa: Huber threshold κ, in units of the return that is learnt from, ``reward_scale`` times
            the environment's.
        priority: What |δ| is, for replay: the difference of the target's ``mean`` and that of the
            prediction, as in DQN, or the mean over ``pairwise`` differences of their quantiles,
            which does not fall below the return's own spread.
        gamma: Discount factor.
        n_steps: Steps of reward that a transition carries before the value is bootstrapped.
        reward_scale: Factor of the rewards that are learnt from.
        learning_rate: Step size of Adam.
        adam_eps: Adam's ε; larger than its default, since the gradients are small.
        target_update_rate: Polyak rate τ: target ← (1-τ) target + τ online, each update.
        gradient_clip_norm: Largest norm of the gradient.
        epsilon_final: Share of random actions after annealing from 1.
        epsilon_share: Share of the steps after the warm-up over which ε falls linearly.
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        hidden_features: tuple[Width, ...] = (128, 128),
        online_quantiles: PositiveInt = 8,
        target_quantiles: PositiveInt = 8,
        policy_quantiles: PositiveInt = 32,
        kappa: PositiveFinite = 1.0,
        priority: Literal["mean", "pairwise"] = "mean",
        gamma: RightOpenUnitInterval = 0.95,
        n_steps: PositiveInt = 1,
        reward_scale: PositiveFinite = 1.0,
        learning_rate: PositiveFinite = 1e-3,
        adam_eps: PositiveFinite = 1e-5,
        target_update_rate: LeftOpenUnitInterval = 0.01,
        gradient_clip_norm: PositiveFloat = 10.0,
        epsilon_final: ClosedUnitInterval = 0.1,
        epsilon_share: ClosedUnitInterval = 0.75,
    ) -> None:
        super().__init__()
        action_spec = env.action_spec_unbatched
        network = GridQuantileNetwork(*grid_sizes(env), hidden_features, policy_quantiles)
        self.policy = QValueActor(network, spec=action_spec)
        self.greedy = EGreedyModule(action_spec, eps_end=epsilon_final)
        self.loss = IQNLoss(
            self.policy,
            action_space=action_spec,
            online_quantiles=online_quantiles,
            target_quantiles=target_quantiles,
            kappa=kappa,
            priority=priority,
            double_dqn=True,
            delay_value=True,
        )
        self.loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
        keep_targets(self.loss)
        self.transitions = Transitions(gamma, n_steps, reward_scale)
        self.target = SoftUpdate(self.loss, tau=target_update_rate)
        self.learning_rate, self.adam_eps = learning_rate, adam_eps
        self.gradient_clip_norm = gradient_clip_norm
        self.epsilon_final, self.epsilon_share = epsilon_final, epsilon_share

    @property
    def behaviour(self) -> TensorDictModule:
        """The policy that collects: greedy but for a share ε of random actions."""
        return TensorDictSequential(self.policy, self.greedy)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build Adam over the online network."""
        parameters = self.loss.parameters()
        adam = Adam(parameters, lr=self.learning_rate, eps=self.adam_eps, fused=True)
        return {"value": adam}

    def compile_losses(self, **options: Any) -> None:
        """Compile the loss by ``torch.compile``, with its options."""
        self.loss.compile(**options)

    def training_step(self, batch: TensorDictBase, optimizer: str) -> Tensor:
        """Compute the loss of a batch and write |δ| into it."""
        loss: Tensor = self.loss(batch)["loss"]
        return loss

    def after_update(self) -> None:
        """Move the target network towards the online one."""
        self.target.step()

    def after_collection(self, progress: float) -> None:
        """Anneal exploration."""
        self.greedy.eps.fill_(linear(1.0, self.epsilon_final, self.epsilon_share, progress))

    @torch.no_grad()
    def figures(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Say what is worth logging after an update."""
        state = batch.select("observation")
        fractions = self.policy.module[0].policy_tau.expand(len(batch), -1)
        quantiles = self.policy(state.set("tau", fractions))["quantiles"]
        taken = quantiles.take_along_dim(batch["action"][:, None, None], -1).squeeze(-1)
        return {**value_figures(self.loss, taken), "train/epsilon": self.greedy.eps}


if __name__ == "__main__":
    from recipes.running.cli import run

    run(IQN)
