"""Replay guided by a frozen judge: a mixture of the judged priority and uniform replay.

Source: Sharony et al. 2026, VLM-Guided Experience Replay, arXiv 2602.01915; on top of Schaul et
al. 2016, Prioritized Experience Replay, arXiv 1511.05952.

N: slots written, B: items of one call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.utils import unravel_index

from vlmrb_torchrl.samplers.indices import checked_values, flat_index
from vlmrb_torchrl.samplers.state import SamplerState
from vlmrb_torchrl.samplers.trees import SumTree, last_of_duplicates, make_sum_tree

# States of a slot that hold no score, as values of the score array: scores are never negative.
_UNSCORED = -1.0
_EMPTY = -2.0


class VLMPrioritizedSampler(SamplerState):
    r"""Draws slot i with probability q(i) = λ q^P(i) + (1 − λ)/N.

    q^P(i) ∝ (p_i + ε)^α, or (p_i |δ_i| + ε)^α with the TD boost, where p_i is the judge's score of
    the slot, thresholded to 0 or 1 unless ``threshold`` is None, and δ_i the latest TD error. While
    no slot has p > 0 there is nothing to prefer, and q is exactly uniform.

    Every batch comes with ``priority_weight`` = (N q)^−β, float32, the weight of the mixture that
    was drawn from (at most (1 − λ)^−β, so no minimum over the buffer is tracked), and with ``q``,
    float64. With ``lmbda=1, td_boost=True, unscored_priority=1`` it is prioritized experience
    replay, with weights before TorchRL's division by the greatest one.

    A slot that is (over)written is unscored and unvisited. Unscored, its p is
    ``unscored_priority``; unvisited, its |δ| is the greatest |δ| seen before it was written, 1
    before the first. Of several scores of one slot (clips may overlap) the greatest counts.

    Args:
        max_capacity: Slots of the storage.
        lmbda: λ in [0, 1], the share of draws that follow the judge; torchrl's ``LinearScheduler``
            can drive it. 0 is uniform replay.
        alpha: α >= 0, exponent of the priority.
        beta: β >= 0, exponent of the weight; 0 (as in the paper) switches it off.
        eps: ε >= 0, keeps every slot drawable under λ = 1. With a million slots scored 0 and one
            positive 32-step clip, q^P gives the clip 99.8 % at 1e-12 and 67 % at 1e-8 (α = 0.6).
        td_boost: Multiply p by |δ| (the paper: in continuous control).
        threshold: Score from which p = 1, else 0; None takes the score itself as p.
        unscored_priority: p̄ in [0, 1], p of a slot that has no score yet.
        dtype: Of priorities and sums; float32 halves the memory (24 bytes a slot in float64).
        device: Of arrays and tree; None follows a CUDA storage and is the CPU else.
        reduction: How a buffer reduces a priority per step of a stored trajectory to one per slot:
            ``"max"``, ``"min"``, ``"median"`` or ``"mean"``.
        max_priority_within_buffer: The running maximum of |δ| is over the slots that still hold
            it, instead of over all time.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = VLMPrioritizedSampler(4, lmbda=0.5)
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=2)
        >>> index = buffer.extend(torch.arange(4))
        >>> sampler.update_score(index, torch.tensor([0.9, 0.1, 0.2, 0.3]))
        >>> slots, info = buffer.sample(return_info=True)
        >>> bool(torch.where(slots == 0, 0.625, 0.125).sub(info["q"]).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        max_capacity: int,
        *,
        lmbda: float = 0.0,
        alpha: float = 0.6,
        beta: float = 0.0,
        eps: float = 1e-12,
        td_boost: bool = False,
        threshold: float | None = 0.5,
        unscored_priority: float = 0.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        reduction: str = "max",
        max_priority_within_buffer: bool = False,
    ) -> None:
        # Not super().__init__: it requires the compiled extension, and builds a min tree that
        # nothing here reads. These are all the attributes that it sets.
        if threshold is not None:
            _require(0.0 <= threshold <= 1.0, "threshold", threshold, "in [0, 1], or None")
        p_bar = unscored_priority
        _require(0.0 <= p_bar <= 1.0, "unscored_priority", p_bar, "in [0, 1]")
        _require(0.0 <= eps < math.inf, "eps", eps, "finite and >= 0")
        choices = ("max", "min", "median", "mean")
        _require(reduction in choices, "reduction", reduction, f"one of {', '.join(choices)}")
        self._max_capacity = max_capacity
        self._eps = eps
        self.td_boost = td_boost
        self.threshold = threshold
        self.unscored_priority = unscored_priority
        self.reduction = reduction
        self.dtype = dtype
        self._max_priority_within_buffer = max_priority_within_buffer
        self._device = torch.device(device) if device is not None else None
        self._alpha = 1.0  # the properties below check what is passed
        self._init()
        self.lmbda = lmbda
        self.alpha = alpha
        self.beta = beta

    def _init(self) -> None:
        device = self._device or torch.device("cpu")
        self._sum_tree: SumTree = make_sum_tree(self._max_capacity, self.dtype, device)
        slots = (self._max_capacity,)
        self._score = torch.full(slots, _EMPTY, dtype=self.dtype, device=device)
        # |δ| of a visited slot; of an unvisited one minus what stands in for it (-0.0 included).
        self._td_error = torch.full(slots, -1.0, dtype=self.dtype, device=device)
        self._written = 0  # slots that were ever written
        self._scored = 0  # of them: slots with a score
        self._positive = 0  # of them: slots with p > 0
        self._max_priority = None

    # ---------------------------------------------------------------- parameters

    @property
    def lmbda(self) -> float:
        """λ in [0, 1]: the share of draws that follow the judge."""
        return self._lmbda

    @lmbda.setter
    def lmbda(self, value: float) -> None:
        value = float(value)
        _require(0.0 <= value <= 1.0, "lmbda", value, "in [0, 1]")
        self._lmbda = value

    @property
    def alpha(self) -> float:
        """α >= 0: exponent of the priority. Setting it recomputes every leaf, O(capacity)."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = float(value)
        # TorchRL's words, for those who match them.
        _require(0.0 <= value < math.inf, "alpha", value, "greater or equal than 0 and finite")
        if value != self._alpha:
            self._alpha = value
            if self._written:
                self._refresh((self._score != _EMPTY).nonzero().squeeze(-1))

    @property
    def beta(self) -> float:
        """β >= 0: exponent of the importance weight; 0 switches it off."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        value = float(value)
        _require(0.0 <= value < math.inf, "beta", value, "greater or equal to 0 and finite")
        self._beta = value

    @property
    def uses_td_error(self) -> bool:
        """Whether draws depend on the TD errors passed to :meth:`update_priority`."""
        return self.td_boost

    @property
    def scored(self) -> Tensor:
        """Which slots have a score, bool ``[max_capacity]``."""
        return self._score >= 0.0

    @property
    def visited(self) -> Tensor:
        """Which slots have a TD error since they were written, bool ``[max_capacity]``."""
        return ~self._td_error.signbit()

    # ---------------------------------------------------------------- drawing

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Tensor]]:
        """Draws slots with replacement.

        Args:
            storage: The storage whose written slots, N = ``len(storage)``, are drawn from.
            batch_size: Number of draws, B.

        Returns:
            Slots, int64 ``[B]`` (a tuple of coordinates for a storage of several dimensions), and
            ``{"priority_weight": (N q)^-β float32 [B], "q": float64 [B]}``.

        Raises:
            RuntimeError: The storage is empty.
        """
        self._maybe_init_from_storage(storage)
        slots = len(storage)
        if slots == 0:
            raise RuntimeError("Cannot sample from an empty storage.")
        if self._written < slots:  # a storage that came with data
            self._claim(torch.arange(slots, device=self.device))
        lmbda = self._lmbda if self._has_positive() else 0.0
        total = self._sum_tree.total() if lmbda > 0.0 else 0.0
        if not total > 0.0:  # λ is 0, or all p are 0, or under eps=0 all p |δ| are
            lmbda = 0.0
        # One uniform number serves both branches: below 1 - λ it is a slot, above a mass.
        draw = self._uniform(batch_size)
        if lmbda < 1.0:
            index = (draw * (slots / (1.0 - lmbda))).long()
        if lmbda > 0.0:
            mass = ((1.0 - draw) * (total / lmbda)).to(self.dtype)
            judged = self._sum_tree.find(mass)
            index = torch.where(draw < 1.0 - lmbda, index, judged) if lmbda < 1.0 else judged
        index = index.clamp_max_(slots - 1)
        if lmbda > 0.0:
            density = torch.as_tensor(self._sum_tree[index]).double() * (lmbda * slots / total)
            density += 1.0 - lmbda
        else:
            density = torch.ones_like(draw)
        weight = density.pow(-self._beta) if self._beta else torch.ones_like(density)
        info = {"priority_weight": weight.float(), "q": density.div_(slots)}
        if storage.ndim > 1:
            return unravel_index(index, storage.shape), info
        return index, info

    def _uniform(self, batch_size: int) -> Tensor:
        rng = self._rng
        source = self.device if rng is None else rng.device
        draw = torch.rand(batch_size, dtype=torch.float64, device=source, generator=rng)
        return draw.to(self.device)

    def _has_positive(self) -> bool:
        return self._positive > 0 or (self.unscored_priority > 0.0 and self._scored < self._written)

    # ---------------------------------------------------------------- writing

    @torch.no_grad()
    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Stores |δ| of slots that a learner visited.

        Args:
            index: int64 ``[B]``, or ``[B, storage.ndim]``; items with index -1 are skipped (a
                ``MaxValueWriter`` marks what it did not store so). Of duplicates the last wins.
            priority: |δ|, ``[B]``, ``[B, 1]`` or one number, in units of return.
            storage: Needed for indices of several dimensions.

        Raises:
            ValueError: A value is NaN, infinite or negative; nothing was written.
            IndexError: An index is out of range; nothing was written.
        """
        self._maybe_init_from_storage(storage)
        index, values, high = self._checked(index, priority, storage, "priority", math.inf)
        if index.numel() == 0:
            return
        self._claim(index)
        self._track_maximum(index, values, high)
        if self._td_error.device.type != "cpu":  # where a scatter has no order
            index, values = last_of_duplicates(index, values)
        self._td_error.scatter_(0, index, values.abs())
        if self.td_boost:
            self._refresh(index)
        if self._max_priority_within_buffer:
            self._restore_maximum(index)

    @torch.no_grad()
    def update_score(self, index: Any, score: Any, *, storage: Any = None) -> None:
        """Stores the judge's scores; a slot that has one keeps the greater.

        Args:
            index: int64 ``[B]``, or ``[B, storage.ndim]``; items with index -1 are skipped.
            score: ``[B]``, ``[B, 1]`` or one number, in [0, 1].
            storage: Needed for indices of several dimensions.

        Raises:
            ValueError: A score is NaN or outside [0, 1]; nothing was written.
            IndexError: An index is out of range; nothing was written.
        """
        self._maybe_init_from_storage(storage)
        index, values, _ = self._checked(index, score, storage, "score", 1.0)
        if index.numel() == 0:
            return
        self._claim(index)
        slot, item = index.unique(return_inverse=True)
        before = self._score[slot]
        after = before.scatter_reduce(0, item, values, "amax")  # no score is below any
        self._score[slot] = after
        self._scored += int((before < 0.0).sum())
        self._positive += int(self._is_positive(after).sum() - self._is_positive(before).sum())
        self._refresh(slot)

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Forgets score and TD error of slots that were (over)written.

        Args:
            index: int or int64 ``[B]``, or ``[B, storage.ndim]``; items with index -1 are skipped.
            storage: Needed for indices of several dimensions.
        """
        self._maybe_init_from_storage(storage)
        index, _ = flat_index(index, storage, self._max_capacity, self.device)
        if index.numel() == 0:
            return
        slot = index.unique() if index.numel() > 1 else index
        before = self._score[slot]
        self._written += int((before == _EMPTY).sum())
        self._scored -= int((before >= 0.0).sum())
        self._positive -= int(self._is_positive(before).sum())
        self._score[slot] = _UNSCORED
        self._td_error[slot] = -float(self.default_priority)
        self._refresh(slot)
        if self._max_priority_within_buffer:
            self._restore_maximum(slot)

    def add(self, index: Any) -> None:
        """Same as :meth:`mark_update`, of one slot; the storage's writer has marked it already."""
        self.extend(index)

    def extend(self, index: Any) -> None:
        """Same as :meth:`mark_update`; indices of several dimensions were marked by the writer."""
        if not isinstance(index, tuple) and torch.as_tensor(index).ndim < 2:
            self.mark_update(index)

    def _checked(
        self, index: Any, values: Any, storage: Any, name: str, most: float
    ) -> tuple[Tensor, Tensor, float]:
        index, stored = flat_index(index, storage, self._max_capacity, self.device)
        if index.numel() == 0:
            return index, index, 0.0
        values, high = checked_values(values, index, stored, name, most)
        return index, values.to(self.dtype), high

    def _claim(self, index: Tensor) -> None:
        """Makes slots that nobody announced as written unscored, for storages that came filled."""
        if self._written < self._max_capacity:
            unknown = index[self._score[index] == _EMPTY]
            if unknown.numel():
                self.mark_update(unknown)

    def _track_maximum(self, index: Tensor, values: Tensor, high: float) -> None:
        greatest = self._max_priority[0]
        if greatest is None or high > greatest:
            self._max_priority = (high, int(index[values.argmax()]))

    def _restore_maximum(self, index: Tensor) -> None:
        """Finds the greatest |δ| anew if the slot that held it is in ``index``."""
        at = self._max_priority[1]
        if at is None or not bool((index == at).any()):
            return
        value, slot = torch.where(self.visited, self._td_error, -1.0).max(0)
        self._max_priority = (float(value), int(slot)) if value >= 0.0 else None

    def _is_positive(self, score: Tensor) -> Tensor:
        return score >= self.threshold if self.threshold is not None else score > 0.0

    def _leaf(self, score: Tensor, td_error: Tensor) -> Tensor:
        p = score if self.threshold is None else (score >= self.threshold).to(self.dtype)
        p = torch.where(score < 0.0, self.unscored_priority, p)
        return (p * td_error.abs() if self.td_boost else p).add_(self._eps).pow_(self._alpha)

    def _refresh(self, index: Tensor) -> None:
        leaf = self._leaf(self._score[index], self._td_error[index])
        self._sum_tree.update(index, leaf)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {name}={value}")
