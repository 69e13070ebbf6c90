"""What an algorithm is: its networks, and one update of them by one batch.

An update returns tensors and reads nothing back, so that it can be compiled, or captured as one
CUDA graph. B: batch.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

import lightning as L
import torch
from lightning.fabric import Fabric
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from recipes.transitions import Transitions
from vlmrb_torchrl import keys

Network = TypeVar("Network", bound=nn.Module)
Figures = dict[str, Tensor]
Signal = Literal["td_error", "reducible_loss"]
"""What replay may go by, of each transition of a batch.

``td_error``: |δ|, at least 0, in units of the return learnt from. ``reducible_loss``: the loss less
that of the target network on the same target, of either sign, in units of the loss.
"""
Learnt = tuple[Tensor, Figures]
"""What an update returns: the signal that it was asked for, ``[B]``; numbers by name."""
Update = Callable[[TensorDictBase], Learnt]


class Gradient(NamedTuple):
    """What an optimizer is to step by: of each of its weights, and the norm before it was cut."""

    optimizer: str
    parts: tuple[Tensor, ...]
    loss: Tensor
    norm: Tensor


class Algorithm(L.LightningModule, ABC):
    """Networks that learn from batches, and the policies that come of it.

    Attributes:
        transitions: What of the collected steps ``update`` reads.
        policy: Acts greedily.
        gradient_clip_norm: Largest norm of an optimizer's gradient; inf: any.
        signal: What ``update`` returns of each transition; set before the first one.
    """

    signal: Signal = "td_error"

    transitions: Transitions
    policy: TensorDictModuleBase
    gradient_clip_norm: float

    @property
    @abstractmethod
    def behaviour(self) -> TensorDictModuleBase:
        """The policy that collects, after the random actions of the warm-up: it explores."""

    @abstractmethod
    def value(self, observation: Tensor) -> Tensor:
        """Value of states ``[B, …]`` in which the greedy policy acts, ``[B]``."""

    @abstractmethod
    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build the optimizers, by the names that ``gradient`` knows them by."""

    @abstractmethod
    def td_error(self, batch: TensorDictBase) -> Tensor:
        """|δ| of a batch that nothing is learnt from, ``[B]``, as ``update`` would find it."""

    @abstractmethod
    def update(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch: every loss, gradient step and target network.

        It may be compiled: no number of a tensor is read, and no branch hangs on one.
        """

    def next_update(self) -> str:
        """Name the method that is the next update, where several take turns."""
        return "update"

    def after_collection(self, progress: float) -> dict[str, float]:
        """Change how it explores, after each round of updates.

        Args:
            progress: Share of the steps after the warm-up that is done, 0 to 1.

        Returns:
            What of it is worth logging, by name.
        """
        return {}

    def signalled(
        self,
        td_error: Tensor,
        losses_of: Callable[[Tensor], Tensor],
        values: Tensor,
        target_values: Callable[[], Tensor],
    ) -> Tensor:
        """Return the signal that was asked for, ``[B]``, as long as no network has moved.

        Args:
            td_error: |δ|, ``[B]``.
            losses_of: The losses ``[B]`` that values have against the target of this update.
            values: The online network's, of the batch's actions.
            target_values: Computes the target network's of the same; called if they are needed.
        """
        if self.signal == "td_error":
            return td_error
        with torch.no_grad():
            return losses_of(values) - losses_of(target_values())

    # ---------------------------------------------------------------- gradient steps

    def prepare(self, fabric: Fabric) -> dict[str, Optimizer]:
        """Move to the device and build the optimizers; several ranks start with equal weights."""
        fabric.to_device(self)
        self._ranks = fabric if fabric.world_size > 1 else None
        if self._ranks is not None:
            self.load_state_dict(fabric.broadcast(self.state_dict()))
        self._optimizers = self.configure_optimizers()
        self._weights = {
            name: [weight for group in optimizer.param_groups for weight in group["params"]]
            for name, optimizer in self._optimizers.items()
        }
        return self._optimizers

    def gradient(self, name: str, loss: Tensor) -> Gradient:
        """Differentiate a loss by the weights of the optimizer ``name``, and by no others.

        Over several ranks it is the mean of theirs. Its norm is cut to ``gradient_clip_norm``.
        """
        gradients = torch.autograd.grad(loss, self._weights[name])
        if self._ranks is not None:
            gradients = mean_over_ranks(self._ranks, gradients)
        norm = nn.utils.get_total_norm(gradients)
        if self.gradient_clip_norm < math.inf:
            scale = (self.gradient_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = tuple(torch._foreach_mul(gradients, scale))
        return Gradient(name, gradients, loss.detach(), norm)

    @torch.compiler.disable  # one fused kernel: compiled, it would cost copies of all weights
    def step(self, gradient: Gradient) -> Figures:
        """Let the optimizer step; return the loss, and the gradient's norm before it was cut."""
        name, gradients, loss, norm = gradient
        for weight, part in zip(self._weights[name], gradients, strict=True):
            weight.grad = part
        self._optimizers[name].step()
        return {f"loss/{name}": loss, f"gradient_norm/{name}": norm}


@torch.compiler.disable
def mean_over_ranks(fabric: Fabric, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Average gradients over the ranks, in one message."""
    flat = nn.utils.parameters_to_vector(gradients)
    mean = fabric.all_reduce(flat, reduce_op="mean")
    parts = mean.split([gradient.numel() for gradient in gradients])
    return tuple(part.view_as(like) for part, like in zip(parts, gradients, strict=True))


def adam(weights: Iterable[nn.Parameter], learning_rate: float, eps: float = 1e-8) -> Adam:
    """Build Adam as one kernel a step, whose count of steps is a tensor, as a CUDA graph wants."""
    return Adam(weights, lr=learning_rate, eps=eps, fused=True, capturable=True)


# -------------------------------------------------------------- parts of updates


def target_of(network: Network) -> Network:
    """Copy a network as its target network, which no gradient flows into."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def track(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move a target network: target ← (1-τ) target + τ online, with τ the ``rate``."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def weighted_mean(losses: Tensor, batch: TensorDictBase) -> Tensor:
    """Mean of losses ``[B]``, weighted by importance where the replay gives weights: Σ w l / Σ w.

    So a common factor of the weights, such as their greatest, changes nothing.
    """
    weights = batch.get(keys.WEIGHT, None)
    return losses.mean() if weights is None else (weights * losses).sum() / weights.sum()


def mean_square(values: Tensor, target: Tensor) -> Tensor:
    """Mean of the squared errors of K critics: ``[B, K]`` against ``[B]`` gives ``[B]``."""
    return (values - target.unsqueeze(-1)).square().mean(-1)


def largest_error(values: Tensor, target: Tensor) -> Tensor:
    """Largest |error| of K critics, nothing to be differentiated: ``[B, K]`` to ``[B]``."""
    return (values.detach() - target.unsqueeze(-1)).abs().amax(-1)


def value_figures(values: Tensor, target: Tensor, td_error: Tensor) -> Figures:
    """Mean value, target and |δ| of a batch; where each value is one of several, their spread.

    Args:
        values: Of the batch's actions, ``[B, K]``: K quantiles of the return, or K critics'.
        target: ``[B]`` or ``[B, K]``.
        td_error: ``[B]``.

    Returns:
        ``value/q``, ``value/target``, ``value/td_error`` and, if K > 1, ``value/spread``: the
        standard deviation over K. All in units of the return that is learnt from.
    """
    values = values.detach()
    figures = {
        "value/q": values.mean(),
        "value/target": target.mean(),
        "value/td_error": td_error.mean(),
    }
    if values.shape[-1] > 1:
        figures["value/spread"] = values.std(-1, correction=0).mean()
    return figures
