"""IQN (Dabney et al. 2018, arXiv 1806.06923), with any replay method.

python -m recipes.iqn --config recipes/configs/doorkey_6x6/iqn.yaml
fabric run --devices=2 recipes/iqn.py --config recipes/configs/doorkey_6x6/iqn.yaml
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.optim import Optimizer
from torchrl.envs import EnvBase
from torchrl.modules import EGreedyModule, QValueActor

from recipes.arguments import (
    ClosedUnitInterval,
    LeftOpenUnitInterval,
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
    target_of,
    track,
    value_figures,
    weighted_mean,
)
from recipes.networks import GridQuantileNetwork, grid_sizes
from recipes.settings import linear
from recipes.transitions import Transitions
from vlmrb_torchrl.objectives import quantile_distance, quantile_huber, quantiles_of


class IQN(Algorithm):
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
        self.network, self.target = network, target_of(network)
        self.online_quantiles, self.target_quantiles = online_quantiles, target_quantiles
        self.kappa, self.priority = kappa, priority
        self.transitions = Transitions(gamma, n_steps, reward_scale)
        self.learning_rate, self.adam_eps = learning_rate, adam_eps
        self.target_update_rate = target_update_rate
        self.gradient_clip_norm = gradient_clip_norm
        self.epsilon_final, self.epsilon_share = epsilon_final, epsilon_share

    @property
    def behaviour(self) -> TensorDictModule:
        """The policy that collects: greedy but for a share ε of random actions."""
        return TensorDictSequential(self.policy, self.greedy)

    def value(self, observation: Tensor) -> Tensor:
        """Value of the best action, ``[B]``."""
        return self.network.values(observation).amax(-1)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build Adam over the online network."""
        return {"value": adam(self.network.parameters(), self.learning_rate, self.adam_eps)}

    def predictions(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Draw quantiles of a batch's returns: where they are taken, and they, ``[B, N]`` each."""
        observation = batch["observation"]
        tau = torch.rand(len(observation), self.online_quantiles, device=observation.device)
        return tau, quantiles_of(self.network.quantiles(observation, tau), batch["action"])

    @torch.no_grad()
    def targets(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Where they should lie, ``[B, N']``: the online network chooses, the target values."""
        following = batch["next", "observation"]
        choice = self.network.values(following).argmax(-1)
        tau = torch.rand(len(following), self.target_quantiles, device=following.device)
        next_value = quantiles_of(self.target.quantiles(following, tau), choice)
        return tau, self.transitions.targets(batch, next_value)

    @torch.no_grad()
    def td_error(self, batch: TensorDictBase) -> Tensor:
        """|δ| of a batch, ``[B]``."""
        tau, prediction = self.predictions(batch)
        target_tau, target = self.targets(batch)
        return quantile_distance(prediction, tau, target, target_tau, self.priority)

    def update(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch."""
        observation, action = batch["observation"], batch["action"]
        tau, prediction = self.predictions(batch)
        target_tau, target = self.targets(batch)
        with torch.no_grad():
            td_error = quantile_distance(prediction, tau, target, target_tau, self.priority)

        def losses_of(prediction: Tensor) -> Tensor:
            return quantile_huber(prediction, tau, target, self.kappa)

        def target_prediction() -> Tensor:
            return quantiles_of(self.target.quantiles(observation, tau), action)

        signal = self.signalled(td_error, losses_of, prediction, target_prediction)
        figures = value_figures(prediction, target, td_error)
        figures |= self.step(self.gradient("value", weighted_mean(losses_of(prediction), batch)))
        track(self.target, self.network, self.target_update_rate)
        return signal, figures

    def after_collection(self, progress: float) -> dict[str, float]:
        """Anneal exploration."""
        epsilon = linear(1.0, self.epsilon_final, self.epsilon_share, progress)
        self.greedy.eps.fill_(epsilon)
        return {"epsilon": epsilon}


if __name__ == "__main__":
    from recipes.running.cli import run

    run(IQN)
