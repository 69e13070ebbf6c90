"""Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905), with any replay method.

python -m recipes.sac --config recipes/configs/scene_task1/sac.yaml
fabric run --devices=2 recipes/sac.py --config recipes/configs/scene_task1/sac.yaml
"""

from __future__ import annotations

import math
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, TanhNormal

from recipes.arguments import (
    FiniteFloat,
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
    largest_error,
    mean_square,
    target_of,
    track,
    value_figures,
    weighted_mean,
)
from recipes.networks import Critics, GaussianPolicy, vector_sizes
from recipes.transitions import Transitions


class SAC(Algorithm):
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
        self.actor = GaussianPolicy(*sizes, hidden_features)
        self.policy = ProbabilisticActor(
            self.actor,
            in_keys=["loc", "scale"],
            spec=action_spec,
            distribution_class=TanhNormal,
        )
        self.critics = Critics(num_critics, *sizes, hidden_features, critic_layer_norm)
        self.target = target_of(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(alpha_init).log())
        self.target_entropy = -float(sizes[-1]) if target_entropy is None else target_entropy
        self.transitions = Transitions(gamma, n_steps, reward_scale)
        self.target_update_rate = target_update_rate
        self.learning_rate, self.gradient_clip_norm = learning_rate, gradient_clip_norm

    @property
    def behaviour(self) -> TensorDictModule:
        """The policy that collects: its draws."""
        # Not ``self.policy``, which builds a distribution for each action.
        return TensorDictModule(self.actor.draw, in_keys=["observation"], out_keys=["action", "_"])

    def value(self, observation: Tensor) -> Tensor:
        """Least value, over the critics, of the policy's most likely action, ``[B]``."""
        loc, _ = self.actor.split(self.actor.mlp(observation))
        values: Tensor = self.critics(observation, loc.tanh()).amin(-1)
        return values

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build Adam over the critics, the actor and the logarithm of the temperature."""
        weights = {
            "critic": self.critics.parameters(),
            "actor": self.actor.parameters(),
            "temperature": [self.log_alpha],
        }
        return {name: adam(chosen, self.learning_rate) for name, chosen in weights.items()}

    @torch.no_grad()
    def targets(self, batch: TensorDictBase) -> Tensor:
        """Where values should lie, ``[B]``, with an action of the actor's and its entropy."""
        following = batch["next", "observation"]
        action, log_prob = self.actor.draw(following)
        next_value = self.target(following, action).amin(-1) - self.log_alpha.exp() * log_prob
        return self.transitions.targets(batch, next_value)

    @torch.no_grad()
    def td_error(self, batch: TensorDictBase) -> Tensor:
        """|δ| of a batch, the larger of the critics', ``[B]``."""
        values = self.critics(batch["observation"], batch["action"])
        return largest_error(values, self.targets(batch))

    def update(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch: critics, then the actor by them, then the temperature."""
        observation = batch["observation"]
        pair = observation, batch["action"]
        alpha = self.log_alpha.detach().exp()
        values, target = self.critics(*pair), self.targets(batch)
        errors, td_error = values - target.unsqueeze(-1), largest_error(values, target)
        signal = self.signalled(
            td_error, partial(mean_square, target=target), values, lambda: self.target(*pair)
        )
        figures = value_figures(values, target, td_error)
        loss = weighted_mean(errors.square().sum(-1), batch)
        figures |= self.step(self.gradient("critic", loss))

        action, log_prob = self.actor.draw(observation)
        entropy = -log_prob.detach().mean()
        # Importance weights are the critics' alone.
        loss = (alpha * log_prob - self.critics(observation, action).amin(-1)).mean()
        figures |= self.step(self.gradient("actor", loss))

        loss = self.log_alpha * (entropy - self.target_entropy)
        figures |= self.step(self.gradient("temperature", loss))
        track(self.target, self.critics, self.target_update_rate)
        return signal, figures | {"train/entropy": entropy, "train/alpha": alpha}


if __name__ == "__main__":
    from recipes.running.cli import run

    run(SAC)
