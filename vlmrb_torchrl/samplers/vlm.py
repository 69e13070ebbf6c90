"""Replay guided by a frozen judge: a mixture of the judged priority and uniform replay.

Source: Sharony et al. 2026, VLM-Guided Experience Replay, arXiv 2602.01915; on top of Schaul et
al. 2016, Prioritized Experience Replay, arXiv 1511.05952.

N: slots written, B: items of one call.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.data.replay_buffers.utils import unravel_index

from vlmrb_torchrl.checks import checked_device, is_real, is_whole, require, shown
from vlmrb_torchrl.keys import PROBABILITY, WEIGHT
from vlmrb_torchrl.samplers.trees import SumTree, last_of_duplicates, make_sum_tree

UNSCORED = -1.0  # score of a slot without one
EMPTY = -1.0  # p of a slot that holds no row
NO_ROW = -math.inf  # |δ| of such a slot

_FILE = "sampler.pt"
# A state of other values describes another distribution, and is refused.
_FIXED = ("max_size", "dtype", "_eps", "td_boost", "threshold", "unscored_priority")
# These a scheduler may have moved, and they are restored.
_MOVING = ("lmbda", "alpha", "beta")
_ARRAYS = ("_score", "_td_error", "_sum_tree")
_BAD_VALUE = "nothing was written; pass scores from 0 to 1, |δ| of 0 or more and finite"


class _Setting:
    """A setting that is checked whenever it is set; TorchRL reads some by their name with a "_"."""

    def __init__(
        self, fits: Callable[[Any], bool], remedy: str, *, moves_leaves: bool = True
    ) -> None:
        self.fits, self._remedy, self._moves_leaves = fits, remedy, moves_leaves

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._kept = name, f"_{name}"

    def __get__(self, sampler: Any, owner: type | None = None) -> Any:
        return self if sampler is None else sampler.__dict__[self._kept]

    def __set__(self, sampler: Any, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() == 1:  # of a scheduler
            value = value.item()
        require(self.fits(value), self._name, value, self._remedy)
        changed = sampler.__dict__.get(self._kept, value) != value
        sampler.__dict__[self._kept] = value
        if changed and self._moves_leaves:
            sampler._rejudge()


class VLMPrioritizedSampler(PrioritizedSampler):
    r"""Draws slot i with probability q(i) = λ q^P(i) + (1 − λ)/N.

    q^P(i) ∝ (p_i + ε)^α, or (p_i |δ_i| + ε)^α with the TD boost, where p_i is the judge's score of
    the slot, thresholded to 0 or 1 unless ``threshold`` is None, and δ_i the latest TD error. While
    no slot has p > 0 there is nothing to prefer, and q is exactly uniform.

    Every batch comes with ``priority_weight`` = (N q)^−β, float32, the weight of the mixture that
    was drawn from (at most (1 − λ)^−β, so no minimum over the buffer is tracked), and with
    ``sampling_probability`` = q, float64. With ``lmbda=1, td_boost=True, unscored_priority=1`` it
    is prioritized experience replay, with weights before TorchRL's division by the greatest one.

    A slot that is (over)written is unscored and unvisited. Unscored, its p is
    ``unscored_priority``; unvisited, its |δ| is the greatest |δ| seen before it was written, 1
    before the first. Of several scores of one slot (clips may overlap) the greatest counts.

    Args:
        max_capacity: Slots of the storage.
        lmbda: λ in [0, 1], the share of draws that follow the judge; torchrl's ``LinearScheduler``
            can drive it. The paper's is at most 0.5; 0 is uniform replay.
        alpha: α >= 0, exponent of the priority.
        beta: β >= 0, exponent of the weight; 0 (as in the paper) switches it off.
        eps: ε >= 0, keeps every slot drawable under λ = 1. With a million slots scored 0 and one
            positive 32-step clip, q^P gives the clip 99.8 % at 1e-12 and 67 % at 1e-8 (α = 0.6).
        td_boost: Multiply p by |δ| (the paper: in continuous control).
        threshold: Score from which p = 1, else 0; None takes the score itself as p.
        unscored_priority: p̄ in [0, 1], p of a slot that has no score yet.
        dtype: Of priorities and sums. In float64 a slot takes 24 bytes, and 16 to 32 in the tree.
        device: Of arrays and tree; None follows a CUDA storage and is the CPU else.
        reduction: How a buffer reduces a priority per step of a stored trajectory to one per slot:
            ``"max"``, ``"min"``, ``"median"`` or ``"mean"``.
        max_priority_within_buffer: The running maximum of |δ| is over the slots that still hold
            it, instead of over all time.

    ``lmbda``, ``alpha``, ``beta``, ``td_boost``, ``threshold`` and ``unscored_priority`` are
    attributes that may be set later; all but λ and β then recompute every leaf, O(capacity).

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = VLMPrioritizedSampler(4)
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=2)
        >>> index = buffer.extend(torch.arange(4))
        >>> sampler.update_score(index, torch.tensor([0.9, 0.1, 0.2, 0.3]))
        >>> slots, info = buffer.sample(return_info=True)
        >>> q = info["sampling_probability"]
        >>> bool(torch.where(slots == 0, 0.625, 0.125).sub(q).abs().max() < 1e-6)
        True
    """

    lmbda = _Setting(lambda value: is_real(value, 0, 1), "use 0 to 1", moves_leaves=False)
    # In TorchRL's words, for those who match them.
    alpha = _Setting(lambda value: is_real(value, 0), "alpha must be greater or equal than 0")
    beta = _Setting(
        lambda value: is_real(value, 0),
        "beta must be greater or equal to 0",
        moves_leaves=False,
    )
    td_boost = _Setting(lambda value: isinstance(value, bool), "use True or False")
    threshold = _Setting(lambda value: value is None or is_real(value, 0, 1), "use 0 to 1, or None")
    unscored_priority = _Setting(lambda value: is_real(value, 0, 1), "use 0 to 1")

    def __init__(
        self,
        max_capacity: int,
        *,
        lmbda: float = 0.5,
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
        known = isinstance(reduction, str) and reduction in ("max", "min", "median", "mean")
        within = max_priority_within_buffer
        for fits, name, value, remedy in (
            (is_whole(max_capacity, 1), "max_capacity", max_capacity, "use a whole number >= 1"),
            (is_real(eps, 0), "eps", eps, "use a finite number >= 0"),
            (known, "reduction", reduction, "use max, min, median or mean"),
            (dtype in (torch.float32, torch.float64), "dtype", dtype, "use float32 or float64"),
            (isinstance(within, bool), "max_priority_within_buffer", within, "use True or False"),
        ):
            require(fits, name, value, remedy)
        self._max_capacity = max_capacity
        self._eps = eps
        self.reduction = reduction
        self.dtype = dtype
        self._max_priority_within_buffer = within
        self._device = None if device is None else checked_device(device, here=True)
        self.lmbda = lmbda
        self.alpha = alpha
        self.beta = beta
        self.td_boost = td_boost
        self.threshold = threshold
        self.unscored_priority = unscored_priority
        self._init()

    def _init(self) -> None:
        """Knows of no row. Also how a buffer empties its sampler."""
        slots, device = self._max_capacity, self._device or torch.device("cpu")
        try:  # the tree last: its C++ does not say no to what is too much
            self._score, self._p, self._td_error = (
                torch.full((slots,), value, dtype=self.dtype, device=device)
                for value in (UNSCORED, EMPTY, NO_ROW)
            )
            self._sum_tree = make_sum_tree(slots, self.dtype, device)
        except (RuntimeError, MemoryError, TypeError):
            require(False, "max_capacity", slots, "use what fits the memory, 50 bytes a slot")
        self._written = 0  # slots that hold a row
        self._positive = 0  # of them: slots with p > 0
        self._max_priority = None
        self._just_marked: Any = None

    # What is known of each slot. Score and |δ| are told; all else follows from them and the
    # settings. Kept beside them for speed: p, the leaves (p + ε)^α or (p |δ| + ε)^α (0 without a
    # row), and the counts.
    _score: Tensor
    _td_error: Tensor  # |δ| of a visited slot; of another one minus what stands in for it
    _p: Tensor
    _sum_tree: SumTree
    _max_priority: Any  # TorchRL's: the greatest |δ| and its slot

    @property
    def scored(self) -> Tensor:
        """Which slots have a score, bool ``[N]``."""
        return self._score >= 0.0

    @property
    def positive(self) -> Tensor:
        """Which slots have a score with p > 0, bool ``[N]``."""
        return self.scored & (self._p > 0.0)

    @property
    def visited(self) -> Tensor:
        """Which slots have a TD error since they were written, bool ``[N]``."""
        return self._td_error >= 0.0

    @property
    def uses_td_error(self) -> bool:
        """Whether draws depend on the TD errors passed to :meth:`update_priority`."""
        return bool(self._td_boost)

    def _judge(self, score: Tensor) -> Tensor:
        """The p of scores ``[B]``, none of them missing."""
        if self._threshold is None:
            return score
        passes: Tensor = score >= self._threshold
        return passes.to(self.dtype)

    def _leaf(self, p: Tensor, td_error: Tensor) -> Tensor:
        """The leaf of p and |δ|, ``[B]`` each; overwrites p."""
        if self._td_boost:
            p.mul_(td_error)
        return p.add_(self._eps).pow_(self._alpha)

    def _refresh(self, index: Tensor) -> None:
        """Brings the leaves of the slots ``index`` ``[B]`` up to date with the arrays."""
        self._sum_tree.update(index, self._leaf(self._p[index], self._td_error[index].abs_()))

    def _derived(self) -> dict[str, Any]:
        """Every p and the counts, from the scores and from which slots hold a row."""
        written = self._td_error > NO_ROW
        p = torch.where(self.scored, self._judge(self._score), self._unscored_priority)
        p = p.masked_fill(~written, EMPTY)
        return {"_p": p, "_written": int(written.sum()), "_positive": int((p > 0.0).sum())}

    def _rejudge(self) -> None:
        """Has everything follow a changed setting."""
        if self._written:
            self.__dict__.update(self._derived())
            self._refresh((self._p != EMPTY).nonzero().squeeze(-1))

    # ---------------------------------------------------------------- drawing

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Tensor]]:
        """Draws slots with replacement.

        Args:
            storage: The storage whose written slots, N = ``len(storage)``, are drawn from.
            batch_size: Number of draws, B.

        Returns:
            Slots, int64 ``[B]`` (a tuple of coordinates for a storage of several dimensions), and
            ``{"priority_weight": (N q)^-β float32 [B], "sampling_probability": q float64 [B]}``,
            all where the storage is.

        Raises:
            RuntimeError: The storage is empty.
            ValueError: ``batch_size`` is no number of draws.
        """
        require(is_whole(batch_size, 0), "batch_size", batch_size, "use a whole number >= 0")
        self._maybe_init_from_storage(storage)
        slots = len(storage)
        if slots == 0:
            raise RuntimeError("Cannot sample from an empty storage.")
        if self._written != slots:
            self.match_storage(storage)
        rng, device = self._rng, self._p.device
        source = device if rng is None else rng.device
        draw = torch.rand(batch_size, dtype=torch.float64, device=source, generator=rng).to(device)
        lmbda, total = self._mixture()
        if lmbda > 0.0:
            # q(i) = λ q^P(i) + (1 − λ)/N with q^P(i) = leaf(i) / Σ leaf. The density is N q.
            index, leaf = self._sum_tree.mix(draw, slots, lmbda, total)
            leaf *= lmbda * slots / total
            leaf += 1.0 - lmbda
            density = leaf if isinstance(leaf, Tensor) else torch.from_numpy(leaf)
        else:
            index = (draw * slots).long().clamp_max_(slots - 1)
            density = torch.ones_like(draw)
        home = getattr(storage, "device", None)
        if home != index.device:
            home = "cpu" if home in (None, "auto") else home
            index, density = index.to(home), density.to(home)
        if self._beta:
            weight = density.pow(-self._beta).float()
        else:
            weight = torch.ones_like(density, dtype=torch.float32)
        info = {WEIGHT: weight, PROBABILITY: density.div_(slots)}
        if storage.ndim > 1:
            return unravel_index(index, storage.shape), info
        return index, info

    def _mixture(self) -> tuple[float, float]:
        """The λ to draw with, 0 while there is nothing to prefer, and the tree's total."""
        total = self._sum_tree.total() if self._positive and self._lmbda > 0.0 else 0.0
        return (self._lmbda, total) if total > 0.0 else (0.0, 0.0)  # 0 under eps=0, all |δ| 0

    def probabilities(self, length: int) -> Tensor:
        """The probability q of every slot, float64 ``[length]``, in closed form.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Raises:
            ValueError: ``length`` is 0 or more than the sampler has slots.
        """
        require(is_whole(length, 1, self._max_capacity), "length", length, "use len(buffer)")
        lmbda, total = self._mixture()
        uniform = torch.full((length,), (1.0 - lmbda) / length, dtype=torch.float64)
        uniform = uniform.to(self._p.device)
        if lmbda == 0.0:
            return uniform
        return uniform.add_(self._sum_tree.leaves()[:length].double(), alpha=lmbda / total)

    def statistics(self, length: int) -> dict[str, float]:
        """Figures for a logger, in one O(N) pass.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Returns:
            ``share_scored``: slots with a score; ``share_positive``: slots with a score and p > 0;
            ``effective_sample_size``: 1 / Σ q²; each as a share of N, in [0, 1].
        """
        if is_whole(length, 0, 0):
            return {"share_scored": 0.0, "share_positive": 0.0, "effective_sample_size": 0.0}
        density = self.probabilities(length).mul_(length)
        return {
            "share_scored": int(self.scored.sum()) / length,
            "share_positive": int(self.positive.sum()) / length,
            "effective_sample_size": 1.0 / float(density.square_().mean()),
        }

    def __repr__(self) -> str:
        names = "lmbda", "alpha", "beta", "td_boost", "threshold", "unscored_priority"
        arguments = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        tree = type(self._sum_tree).__name__
        return f"{type(self).__name__}({self._max_capacity}, {arguments}, tree={tree})"

    # ---------------------------------------------------------------- writing

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Stores |δ| of slots that a learner visited.

        Args:
            index: int64 ``[B]``, or ``[B, storage.ndim]``; items with index -1 are skipped (a
                ``MaxValueWriter`` marks what it did not store so). Of duplicates the last wins.
            priority: |δ|, ``[B]``, ``[B, 1]`` or one number, in units of return.
            storage: Needed for indices of several dimensions.

        Raises:
            ValueError: A value is NaN, infinite, negative, or so large that N of them would have an
                infinite sum; nothing was written.
            IndexError: An index is out of range; nothing was written.
        """
        index, p, stored = self._slots(index, storage)
        if index.numel() == 0:
            return
        # Even with all N slots at this priority the tree's total is finite.
        most = (torch.finfo(self.dtype).max / self._max_capacity) ** (1.0 / max(self._alpha, 1.0))
        values, high = self._values(priority, index, stored, "priority", most)
        p = self._claim(index, p)
        greatest = self._max_priority[0]
        if greatest is None or high > greatest:
            self._max_priority = (high, int(index[values.argmax()]))
        if index.device.type != "cpu":  # there a scatter writes duplicates in any order
            index, values = last_of_duplicates(index, values)
            p = self._p[index]
        self._td_error.scatter_(0, index, values)
        if self._td_boost:
            self._sum_tree.update(index, self._leaf(p, values))
        self._restore_maximum(index)

    def update_score(self, index: Any, score: Any, *, storage: Any = None) -> None:
        """Stores the judge's scores; a slot that has one keeps the greater.

        Args:
            index: As of :meth:`update_priority`.
            score: ``[B]``, ``[B, 1]`` or one number, in [0, 1].
            storage: As of :meth:`update_priority`.

        Raises:
            ValueError: A score is NaN or outside [0, 1]; nothing was written.
            IndexError: An index is out of range; nothing was written.
        """
        index, p, stored = self._slots(index, storage)
        if index.numel() == 0:
            return
        values, _ = self._values(score, index, stored, "score", 1.0)
        self._claim(index, p)
        slot, item = index.unique(return_inverse=True)
        after = self._score[slot].scatter_reduce(0, item, values, "amax")  # a score is above none
        p_before, p_after = self._p[slot], self._judge(after)
        self._score[slot] = after
        self._p[slot] = p_after
        self._positive += int((p_after > 0.0).count_nonzero() - (p_before > 0.0).count_nonzero())
        self._refresh(slot)

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Makes slots that were (over)written unscored and unvisited.

        Index, storage and IndexError are as of :meth:`update_priority`.
        """
        slot = self._slots(index, storage)[0]
        self._reset(slot.unique() if slot.numel() > 1 else slot)
        self._just_marked = index

    def extend(self, index: Any) -> None:
        """Same as :meth:`mark_update`. A no-op right after it with the same tensor.

        That is what a buffer does: its writer marks the slots (giving the storage that indices of
        several dimensions need), then the buffer announces them here.
        """
        if index is not self._just_marked:
            self.mark_update(index)
        self._just_marked = None

    add = extend

    def match_storage(self, storage: Any) -> None:
        """Takes over which slots hold a row, N = ``len(storage)``: the first N, and no others.

        Rows that were never announced came with the storage, and are unscored and unvisited. Slots
        behind the rows were emptied by another buffer of the storage.
        """
        slots = len(storage)
        if self._written < slots:
            self._claim(torch.arange(slots, device=self._p.device), self._p[:slots])
        if self._written > slots:
            self._score[slots:], self._td_error[slots:] = UNSCORED, NO_ROW
            gone = torch.arange(slots, self._max_capacity, device=self._p.device)
            self._sum_tree.update(gone, torch.zeros_like(gone, dtype=self.dtype))
            self.__dict__.update(self._derived())
            self._restore_maximum(gone)

    def _reset(self, slot: Tensor) -> None:
        """Makes distinct slots, int64 ``[B]``, hold a row of which nothing is known."""
        if slot.numel() == 0:
            return
        before = self._p.index_select(0, slot)
        if self._written < self._max_capacity:
            self._written += int((before == EMPTY).count_nonzero())
        now_positive = slot.numel() if self._unscored_priority > 0.0 else 0
        self._positive += now_positive - int((before > 0.0).count_nonzero())
        # What stands in for |δ| must be above 0, since its minus sign says that it is none.
        stand_in = max(float(self.default_priority), torch.finfo(self.dtype).tiny)
        self._score.index_fill_(0, slot, UNSCORED)
        self._p.index_fill_(0, slot, self._unscored_priority)
        self._td_error.index_fill_(0, slot, -stand_in)
        mass = self._unscored_priority * (stand_in if self._td_boost else 1.0) + self._eps
        self._sum_tree.update(slot, torch.full_like(slot, mass**self._alpha, dtype=self.dtype))
        self._restore_maximum(slot)

    def _claim(self, index: Tensor, p: Tensor) -> Tensor:
        """Resets slots that were never announced as written: the storage came with data."""
        if self._written < self._max_capacity:
            unknown = p == EMPTY
            if unknown.any():
                self._reset(index[unknown].unique())
                return self._p[index]
        return p

    def _restore_maximum(self, index: Tensor) -> None:
        """Within the buffer: finds the greatest |δ| anew if its slot is in ``index``."""
        holder = self._max_priority[1] if self._max_priority_within_buffer else None
        if holder is None or not bool((index == holder).any()):
            return
        value, slot = self._td_error.max(0)
        self._max_priority = (float(value), int(slot)) if value >= 0.0 else None

    def _slots(self, index: Any, storage: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Slots ``[K]`` that a call names, their p, and which of its items they are (None: all)."""
        self._maybe_init_from_storage(storage)
        self._just_marked = None
        p = self._p
        flat = isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long
        if flat and index.device.type == "cpu" == p.device.type:
            try:  # the gather that is needed anyway is the cheapest range check there is
                return index, p.index_select(0, index), None
            except IndexError:  # a -1 to skip, or an index to name in an error
                pass
        slot = as_index(index, "index").to(p.device)
        slot = _ravel(slot, storage) if slot.ndim > 1 else slot.reshape(-1)
        low, high = _bounds(slot) if slot.numel() else (0, 0)
        if low < -1 or high >= self._max_capacity:
            raise IndexError(
                f"index {int(low if low < -1 else high)} is no slot of a sampler of capacity "
                f"{self._max_capacity}: pass the indices that extend or sample returned."
            )
        stored = slot >= 0 if low < 0 else None
        slot = slot if stored is None else slot[stored]
        return slot, p.index_select(0, slot), stored

    def _values(
        self, values: Any, index: Tensor, stored: Tensor | None, name: str, most: float
    ) -> tuple[Tensor, float]:
        """One finite value in [0, ``most``] per slot, rounded to ``dtype``, and the greatest.

        ``values`` is a number for all or B of them; ``index`` and ``stored`` are :meth:`_slots`'.
        """
        values = as_numbers(values, name, dtype=self.dtype, device=index.device)
        if values.requires_grad:
            values = values.detach()
        items = index.numel() if stored is None else stored.numel()
        if values.numel() == items:
            values = values.reshape(-1)
            values = values if stored is None else values[stored]
        elif values.numel() == 1:
            values = values.reshape(1).expand(index.shape)
        else:  # in TorchRL's words and kind
            raise RuntimeError(
                f"{name} should be a number or an iterable of the same length as index: "
                f"got {name} of shape {tuple(values.shape)} for {items} indices."
            )
        low, high = _bounds(values)
        bad = low if not low >= 0.0 else high  # a NaN is both
        require(low >= 0.0 and high <= most, name, bad, _BAD_VALUE)
        return values, high

    # ---------------------------------------------------------------- saving and moving

    def state_dict(self) -> dict[str, Any]:
        """A copy of what the next draw follows from, but for the buffer's generator."""
        return {
            **{name: getattr(self, name) for name in (*_FIXED, *_MOVING, "_max_priority")},
            "_score": self._score.clone(),
            "_td_error": self._td_error.clone(),
            # Leaves as they are: recomputed ones can differ in the last bit, since a vectorised
            # power rounds otherwise than the scalar one at a batch's end.
            "_sum_tree": self._sum_tree.leaves(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, on this sampler's device and kind of tree.

        Raises:
            ValueError: The state is of another capacity or configuration, or is damaged; nothing
                changed.
        """
        self._restore(state_dict, self._p.device)

    def _restore(self, state: Any, device: torch.device) -> None:
        of, damaged = "sampler state", "the state is damaged"
        require(isinstance(state, Mapping), of, state, "pass what state_dict returned")
        names = (*_FIXED, *_MOVING, "_max_priority", *_ARRAYS)
        lacking = [name for name in names if name not in state]
        require(not lacking, of, f"without {', '.join(lacking)}", damaged)
        for name in _FIXED:
            mine, theirs = getattr(self, name), state[name]
            setting, remedy = name.lstrip("_"), f"build the sampler so; here {mine}"
            require(mine == theirs, f"{of}'s {setting}", theirs, remedy)
        for name in _MOVING:
            fits = getattr(type(self), name).fits(state[name])
            require(fits, f"{of}'s {name}", state[name], damaged)
        for name in _ARRAYS:
            array = state[name]
            fits = isinstance(array, Tensor) and array.shape == self._score.shape
            fits = fits and array.dtype == self.dtype
            require(fits, f"{of}'s {name}", array, f"pass {self._max_capacity} of {self.dtype}")
        maximum = state["_max_priority"]
        pair = isinstance(maximum, (tuple, list)) and len(maximum) == 2
        fits = pair and (
            (is_real(maximum[0], 0) and is_whole(maximum[1], 0, self._max_capacity - 1))
            or (maximum[0] is None and maximum[1] is None)
        )
        require(fits, f"{of}'s _max_priority", maximum, damaged)

        loaded = object.__new__(type(self))
        loaded.__dict__.update(self.__dict__, _just_marked=None)
        loaded.__dict__.update({f"_{name}": state[name] for name in _MOVING})
        loaded._max_priority = maximum
        loaded._score = score = state["_score"].to(device, copy=True)
        loaded._td_error = td_error = state["_td_error"].to(device, copy=True)
        loaded.__dict__.update(loaded._derived())
        leaves, scored, visited = state["_sum_tree"].to(device), loaded.scored, loaded.visited
        loaded._sum_tree = make_sum_tree(self._max_capacity, self.dtype, device)
        loaded._sum_tree.update(torch.arange(self._max_capacity, device=device), leaves)

        written, ulps = td_error != NO_ROW, 64.0 * torch.finfo(self.dtype).eps
        leaf = loaded._leaf(loaded._p.clone(), td_error.abs()).masked_fill_(~written, 0.0)
        greatest = float(td_error[visited].max()) if visited.any() else -1.0
        value, holder = (-1.0, None) if maximum[0] is None else maximum
        held = holder is None or not self._max_priority_within_buffer
        for holds, fault in (
            ((scored & (score <= 1.0) | (score == UNSCORED)).all(), "a score outside [0, 1]"),
            ((td_error.isfinite() | ~written).all(), "a TD error that is not finite"),
            (not (scored & ~written).any(), "a score of a slot never written"),
            (torch.allclose(leaves, leaf, rtol=ulps, atol=0.0), "a leaf off its formula"),
            (greatest <= value, "a TD error above the running maximum"),
            (held or td_error[holder] == value, "a running maximum of a slot without it"),
        ):
            require(bool(holds), of, f"with {fault}", damaged)
        self.__dict__.update(loaded.__dict__)

    def _maybe_init_from_storage(self, storage: Any) -> None:
        """Moves to the storage's device where the sampler was given none, keeping its state."""
        device = self._tree_device_from_storage(storage)
        if device is not None and device != self._p.device:
            self._restore(self.state_dict(), device)

    def dumps(self, path: str | Path) -> None:
        """Writes :meth:`state_dict` into the folder ``path``, whole or not at all."""
        folder = Path(path).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_FILE}.{os.getpid()}"
        torch.save(self.state_dict(), partial)
        partial.replace(folder / _FILE)

    def loads(self, path: str | Path) -> None:
        """Restores what :meth:`dumps` wrote.

        Raises:
            FileNotFoundError: The folder holds no sampler.
            ValueError: See :meth:`load_state_dict`.
        """
        file = Path(path) / _FILE
        self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def check_valid(self) -> None:
        """Looks whether scores, |δ| and all that follows from them agree, in one O(N) pass.

        Raises:
            ValueError: They do not; the message names what is off.
        """
        twin = copy(self)
        twin.load_state_dict(self.state_dict())
        for name in ("_p", "_written", "_positive"):
            mine, derived = getattr(self, name), getattr(twin, name)
            same = torch.equal(torch.as_tensor(mine), torch.as_tensor(derived))
            require(same, name, mine, "it is off what the scores give")
        total, ulps = self._sum_tree.total(), 64.0 * torch.finfo(self.dtype).eps
        summed = float(self._sum_tree.leaves().double().sum())
        require(abs(total - summed) <= ulps * summed, "the tree's total", total, f"sum is {summed}")


# ---------------------------------------------------------------- reading arguments


def as_numbers(values: Any, name: str, **kind: Any) -> Tensor:
    """``torch.as_tensor`` that names what it refuses.

    Raises:
        TypeError: ``values`` are no real numbers.
    """
    try:
        if not (isinstance(values, Tensor) and values.is_complex()):
            return torch.as_tensor(values, **kind)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"{name} is {shown(values)}: pass numbers, or a tensor of them.")


def as_index(index: Any, name: str) -> Tensor:
    """Slots or stamps as int64, of the shape that they come in; a tuple has an axis in each.

    Raises:
        TypeError: They are no numbers.
        IndexError: They are no whole numbers.
    """
    if isinstance(index, tuple):
        axes = [as_numbers(axis, name) for axis in index]
        if len({axis.shape for axis in axes}) == 1:
            index = torch.stack(axes, -1)
    whole = as_numbers(index, name)
    if whole.numel() and (whole.is_floating_point() or whole.dtype == torch.bool):
        raise IndexError(f"{name} is {shown(whole)}: slots and stamps are whole numbers.")
    return whole.long()


def _bounds(values: Tensor) -> tuple[float, float]:
    """Least and greatest value; both NaN where one value is. One device synchronisation."""
    low, high = torch.aminmax(values)
    if values.device.type == "cpu":
        return low.item(), high.item()
    low, high = torch.stack((low, high)).tolist()
    return low, high


def _ravel(index: Tensor, storage: Any) -> Tensor:
    """Flat slots ``[B]`` of coordinates ``[..., storage.ndim]``."""
    if storage is None:
        raise RuntimeError(
            "storage should be provided to the sampler when the storage has more than one "
            f"dimension: got an index of shape {tuple(index.shape)}; pass storage=buffer.storage."
        )
    axes = index.reshape(-1, index.shape[-1]).cpu().unbind(-1)
    try:
        flat = np.ravel_multi_index([axis.numpy() for axis in axes], tuple(storage.shape))
    except ValueError as error:
        raise IndexError(
            f"index is {shown(index.tolist())}, not all slots of a storage of shape "
            f"{tuple(storage.shape)}: {error}."
        ) from None
    return torch.from_numpy(flat).to(index.device)
