"""Replay of what can still be learnt: priorities from how far the target network is ahead.

Source: Sujit et al. 2023, Prioritizing Samples in Reinforcement Learning with Reducible Loss,
arXiv 2208.10483, and its authors' code.

B: items of one call.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vlmrb_torchrl.checks import require
from vlmrb_torchrl.samplers.arguments import as_numbers
from vlmrb_torchrl.samplers.vlm import VLMPrioritizedSampler


class ReducibleLossSampler(VLMPrioritizedSampler):
    r"""ReLo: P(i) ∝ (f(L_i − L'_i) + ε)^α with weights (N P)^−β.

    L is the loss of the online network and L' that of the target network, on the same target of the
    same transition: where both are large nothing is left to be learnt but noise. Right after the
    target network was set to the online one all of them are 0, and draws are uniform by ε.

    What is written by ``update_priority`` are the differences, of either sign. As with TD errors a
    slot that is (over)written takes the greatest f seen before, at least 1.

    Args:
        max_capacity: Slots of the storage.
        mapping: f. ``"relu"``: max(x, 0), the paper's; ``"exponential"``: x + 1 if x ≥ 0, else e^x,
            which its authors took for Rainbow and which tells negative differences apart.
        alpha: α ≥ 0; the authors took 0.6, for SAC 0.5.
        beta: β ≥ 0 at the start; the authors let it rise from 0.4 to 1.
        eps: ε ≥ 0, in units of the loss. The paper leaves it open; its code has 1e-5 for MinAtar.
        **arguments: ``dtype``, ``device``, ``reduction`` and ``max_priority_within_buffer``, as of
            ``VLMPrioritizedSampler``.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = ReducibleLossSampler(3, alpha=1.0, eps=1.0)
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(3), sampler=sampler, batch_size=2)
        >>> index = buffer.extend(torch.arange(3))
        >>> sampler.update_priority(index, torch.tensor([-2.0, 0.0, 2.0]))
        >>> sampler.probabilities(3)
        tensor([0.2000, 0.2000, 0.6000], dtype=torch.float64)
    """

    def __init__(
        self,
        max_capacity: int,
        *,
        mapping: Literal["relu", "exponential"] = "relu",
        alpha: float = 0.6,
        beta: float = 0.4,
        eps: float = 1e-5,
        **arguments: Any,
    ) -> None:
        known = mapping in ("relu", "exponential")
        require(known, "mapping", mapping, "use relu or exponential")
        self.mapping = mapping
        super().__init__(
            max_capacity,
            lmbda=1.0,
            alpha=alpha,
            beta=beta,
            eps=eps,
            td_boost=True,
            unscored_priority=1.0,
            **arguments,
        )

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Stores what can be learnt of slots that a learner visited.

        Args:
            index: As of ``VLMPrioritizedSampler``.
            priority: L − L', ``[B]``, ``[B, 1]`` or one number, of either sign.
            storage: As of ``VLMPrioritizedSampler``.

        Raises:
            ValueError: A difference is NaN or infinite, or too large; nothing was written.
            IndexError: An index is out of range; nothing was written.
        """
        difference = as_numbers(priority, "priority").detach()
        super().update_priority(index, self._mapped(difference), storage=storage)

    def _mapped(self, difference: Tensor) -> Tensor:
        difference = difference if difference.is_floating_point() else difference.to(self.dtype)
        mapped = difference.relu()
        if self.mapping == "exponential":
            mapped = torch.where(difference < 0, difference.exp(), difference + 1)
        # Else the limit of -inf would pass for a number.
        return mapped.masked_fill(difference == -torch.inf, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """See ``VLMPrioritizedSampler``."""
        return {**super().state_dict(), "mapping": self.mapping}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``VLMPrioritizedSampler``; a state of another mapping is refused."""
        self._require_form(state_dict)
        mapping = state_dict.get("mapping")
        remedy = f"build the sampler so; here {self.mapping}"
        require(mapping == self.mapping, "sampler state's mapping", mapping, remedy)
        super().load_state_dict(state_dict)
