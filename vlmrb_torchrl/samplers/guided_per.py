"""VLM-RB over PER: what the judge leaves of the draws follows the TD errors.

Ours, not the paper's, whose rest is uniform. B: items of one call, N: slots that hold a row.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrb_torchrl.checks import is_real, require
from vlmrb_torchrl.samplers.trees import CompiledSumTree
from vlmrb_torchrl.samplers.vlm import VLMPrioritizedSampler


class GuidedPERSampler(VLMPrioritizedSampler):
    r"""Draws slot i with probability q(i) = λ q^P(i) + (1 − λ) q^R(i).

    q^P follows the judge, as in ``VLMPrioritizedSampler``; q^R(i) ∝ (|δ_i| + ε_R)^α_R is
    prioritized experience replay, where the paper's rest is uniform. While no slot has p > 0 it is
    prioritized experience replay alone. Weights and probabilities of draws are those of the
    mixture.

    Args:
        max_capacity: Slots of the storage.
        rest_alpha: α_R in [0, 1]; 0 is the paper's uniform rest.
        rest_eps: ε_R >= 0, in units of return.
        **arguments: As of ``VLMPrioritizedSampler``.

    Attributes:
        rest: Draws by q^R.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = GuidedPERSampler(3, lmbda=0.5, rest_eps=0.0)
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(3), sampler=sampler, batch_size=2)
        >>> index = buffer.extend(torch.arange(3))
        >>> sampler.update_priority(index, torch.tensor([0.0, 1.0, 3.0]))
        >>> sampler.probabilities(3)
        tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64)
        >>> sampler.update_score(index, torch.tensor([0.9, 0.1, 0.2]))
        >>> sampler.probabilities(3).round(decimals=6)
        tensor([0.5000, 0.1250, 0.3750], dtype=torch.float64)
    """

    def __init__(
        self,
        max_capacity: int,
        *,
        rest_alpha: float = 1.0,
        rest_eps: float = 1e-3,
        **arguments: Any,
    ) -> None:
        require(is_real(rest_alpha, 0, 1), "rest_alpha", rest_alpha, "use a number from 0 to 1")
        require(is_real(rest_eps, 0), "rest_eps", rest_eps, "use a finite number >= 0")
        super().__init__(max_capacity, **arguments)
        self.rest = VLMPrioritizedSampler(
            max_capacity,
            lmbda=1.0,
            alpha=rest_alpha,
            eps=rest_eps,
            td_boost=True,
            unscored_priority=1.0,
            dtype=self.dtype,
            device=self._device,
            max_priority_within_buffer=self._max_priority_within_buffer,
        )

    @property
    def uses_td_error(self) -> bool:
        """Whether draws depend on the TD errors passed to :meth:`update_priority`."""
        return True

    # ---------------------------------------------------------------- drawing

    def _draw_in_numpy(
        self, tree: CompiledSumTree, draw: np.ndarray, slots: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lmbda, total = self._mixture(self._lmbda)
        other, rest, rest_tree = 1.0 - lmbda, self.rest, self.rest._sum_tree
        assert isinstance(rest_tree, CompiledSumTree)
        by_rest = draw < other  # one number serves both, as in the base class
        slot = np.empty(len(draw), np.int64)
        if by_rest.any():
            slot[by_rest] = rest._draw_in_numpy(rest_tree, draw[by_rest] / other, slots)[0]
        if not by_rest.all():
            slot[~by_rest] = tree.mix(draw[~by_rest], slots, lmbda, total)[0]
        index = torch.from_numpy(slot)
        density = lmbda * self._density(index, slots) + other * rest._density(index, slots)
        density = density.numpy()
        weight = (density**-self._beta).astype(np.float32)
        return slot, weight, density / slots

    def _draw(self, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, _, lmbda, minus_beta = self._drawn_with.unbind()
        lmbda, total = self._mixture(lmbda)
        other = 1.0 - lmbda
        by_leaf = self._sum_tree.find((1.0 - draw).mul_(total / lmbda).to(self.dtype))
        below_one = 1.0 - torch.finfo(draw.dtype).eps
        by_rest, _, _ = self.rest._draw((draw / other).clamp_max(below_one))
        index = torch.where(draw < other, by_rest, by_leaf)
        density = lmbda * self._density(index, rows) + other * self.rest._density(index, rows)
        return index, density.pow(minus_beta).float(), density / rows

    def _rest_of(self, length: int) -> Tensor:
        return self.rest.probabilities(length)

    # ---------------------------------------------------------------- writing

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Stores |δ| of slots that a learner visited; see ``VLMPrioritizedSampler``."""
        super().update_priority(index, priority, storage=storage)
        self.rest.update_priority(index, priority, storage=storage)

    def _reset(self, slot: Tensor) -> None:
        super()._reset(slot)
        self.rest._reset(slot)

    def _match(self, rows: int) -> None:
        super()._match(rows)
        self.rest._match(rows)

    def _empty(self) -> None:
        super()._empty()
        self.rest._empty()

    # ---------------------------------------------------------------- saving and moving

    def state_dict(self) -> dict[str, Any]:
        """See ``VLMPrioritizedSampler``."""
        return {**super().state_dict(), "rest": self.rest.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``VLMPrioritizedSampler``."""
        self._require_form(state_dict)
        rest = copy(self.rest)
        rest.load_state_dict(state_dict.get("rest", {}))
        super().load_state_dict(state_dict)
        self.rest = rest

    def _maybe_init_from_storage(self, storage: Any) -> None:
        super()._maybe_init_from_storage(storage)
        self.rest._maybe_init_from_storage(storage)

    def check_valid(self) -> None:
        """See ``VLMPrioritizedSampler``; both must have been told the same TD errors."""
        super().check_valid()
        self.rest.check_valid()
        mine, theirs = (each._td_error[: self._max_capacity] for each in (self, self.rest))
        require(torch.equal(mine, theirs), "rest._td_error", theirs, f"the TD errors are {mine}")
