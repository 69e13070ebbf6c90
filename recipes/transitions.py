"""What is kept of collected steps, over n steps with scaled rewards, and what they aim at.

N: environments, T: steps of each, n: steps that a transition spans.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import MultiStep

_READ: tuple[NestedKey, ...] = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "done"),
    ("next", "terminated"),
)
_SPAN = "steps_to_next_obs"  # by this power of γ the value behind a transition is discounted


class Transitions:
    """Turns steps ``[N, T]``, or an episode ``[T]``, into the transitions that the buffer keeps.

    Transition t leads from o_t to o_{t+n} with reward Σ_k γ^k r_{t+k}, or to the episode's end
    where that comes first. TorchRL's ``MultiStep`` sums and looks ahead, but leaves it the
    ``terminated`` of its first step, so that losses bootstrap from terminal states; here it has
    that of the step which its ``("next", "observation")`` comes from.

    The last n - 1 transitions of a collected batch span fewer steps, as what follows is not played
    yet. ``"steps_to_next_obs"`` ``[N, T, 1]`` holds how many; n = 1 leaves it out.

    Args:
        gamma: Discount factor γ.
        n_steps: n, at least 1.
        reward_scale: Factor of the rewards; |δ| is in units of the scaled return.

    Example:
        >>> transitions = Transitions(gamma=0.98, n_steps=3)
        >>> index = buffer.extend(transitions(data).reshape(-1))
    """

    def __init__(self, gamma: float, n_steps: int = 1, reward_scale: float = 1.0) -> None:
        # With a γ of 0, which MultiStep refuses, no reward but the first counts.
        self._multi_step = MultiStep(gamma, n_steps) if n_steps > 1 and gamma > 0 else None
        self.gamma, self._reward_scale = gamma, reward_scale

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        """Build the transitions; the steps stay as they are."""
        steps = data.select(*_READ)
        if self._reward_scale != 1:
            steps["next", "reward"] = steps["next", "reward"] * self._reward_scale
        if self._multi_step is None:
            return steps
        spanned = self._multi_step(steps)
        span = spanned[_SPAN].unsqueeze(-1)
        last = torch.arange(steps.shape[-1]).unsqueeze(-1) + span - 1
        for end in (("next", "done"), ("next", "terminated")):
            spanned[end] = steps[end].gather(-2, last)
        return spanned.select(*_READ).set(_SPAN, span)

    def targets(self, batch: TensorDictBase, value: Tensor) -> Tensor:
        """Bootstrap: R + γ^n V, and R alone where the episode terminated.

        Args:
            batch: Transitions ``[B]``.
            value: V of their ``("next", "observation")``, ``[B]``, or ``[B, K]`` for K of each.

        Returns:
            Targets in the shape of ``value``, in units of the scaled return.
        """
        span = batch.get(_SPAN, None)
        discount = self.gamma if span is None else self.gamma**span
        reward, ended = batch.get(("next", "reward")), batch.get(("next", "terminated"))
        columns = value.unsqueeze(-1) if value.ndim == 1 else value
        targets: Tensor = torch.where(ended, reward, reward + discount * columns)
        return targets.view_as(value)
