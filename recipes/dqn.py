"""Double DQN (van Hasselt et al. 2016, arXiv 1509.06461), with any replay method.

python -m recipes.dqn --config recipes/configs/doorkey_6x6/dqn.yaml
fabric run --devices=2 recipes/dqn.py --config recipes/configs/doorkey_6x6/dqn.yaml
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torch.nn import functional
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
from recipes.networks import GridQNetwork, grid_sizes
from recipes.settings import linear
from recipes.transitions import Transitions


class DQN(Algorithm):
    """Double DQN with a soft target network and ε-greedy exploration.

    Args:
        env: Environment whose specs the networks are built for.
        hidden_features: Width of each hidden layer.
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
        network = GridQNetwork(*grid_sizes(env), hidden_features)
        self.policy = QValueActor(network, spec=action_spec)
        self.greedy = EGreedyModule(action_spec, eps_end=epsilon_final)
        self.network, self.target = network, target_of(network)
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

    @torch.no_grad()
    def targets(self, batch: TensorDictBase) -> Tensor:
        """Where values should lie, ``[B]``: the online network chooses, the target one values."""
        following = batch["next", "observation"]
        choice = self.network.values(following).argmax(-1)
        return self.transitions.targets(batch, self.target.value(following, choice))

    @torch.no_grad()
    def td_error(self, batch: TensorDictBase) -> Tensor:
        """|δ| of a batch, ``[B]``."""
        value = self.network.value(batch["observation"], batch["action"])
        return (self.targets(batch) - value).abs()

    def update(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch."""
        action = batch["action"]
        value, target = self.network.value(batch["observation"], action), self.targets(batch)
        td_error = (target - value.detach()).abs()

        def losses_of(value: Tensor) -> Tensor:
            return functional.smooth_l1_loss(value, target, reduction="none")

        signal = self.signalled(
            td_error, losses_of, value, lambda: self.target.value(batch["observation"], action)
        )
        figures = value_figures(value.unsqueeze(-1), target, td_error)
        figures |= self.step(self.gradient("value", weighted_mean(losses_of(value), batch)))
        track(self.target, self.network, self.target_update_rate)
        return signal, figures

    def after_collection(self, progress: float) -> dict[str, float]:
        """Anneal exploration."""
        epsilon = linear(1.0, self.epsilon_final, self.epsilon_share, progress)
        self.greedy.eps.fill_(epsilon)
        return {"epsilon": epsilon}


if __name__ == "__main__":
    from recipes.running.cli import run

    run(DQN)
