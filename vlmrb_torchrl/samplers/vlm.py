"""Replay guided by a frozen judge: a mixture of the judged priority and uniform replay.

Source: Sharony et al. 2026, VLM-Guided Experience Replay, arXiv 2602.01915; on top of Schaul et
al. 2016, Prioritized Experience Replay, arXiv 1511.05952.

N: slots written, B: items of one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from vlmrb_torchrl.checks import checked_device, is_real, is_whole, require
from vlmrb_torchrl.keys import PROBABILITY, WEIGHT
from vlmrb_torchrl.samplers.arguments import as_index, as_numbers, raveled, sent, unraveled
from vlmrb_torchrl.samplers.saving import SavedInFolder
from vlmrb_torchrl.samplers.trees import (
    CompiledSumTree,
    SumTree,
    last_of_duplicates,
    make_sum_tree,
)

UNSCORED = -1.0  # score of a slot without one
EMPTY = -1.0  # p of a slot that holds no row
NO_ROW = -math.inf  # |δ| of such a slot

# A state of other values describes another distribution, and is refused.
_FIXED = (
    *("max_size", "dtype", "_eps", "td_boost"),
    *("threshold", "negative_priority", "unscored_priority"),
)
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


class VLMPrioritizedSampler(SavedInFolder, PrioritizedSampler):
    r"""Draws slot i with probability q(i) = λ q^P(i) + (1 − λ)/N.

    q^P(i) ∝ (p_i + ε)^α, or (p_i |δ_i| + ε)^α with the TD boost, where p_i follows the judge's
    score of the slot, thresholded to No or Yes unless ``threshold`` is None, and δ_i is the latest
    TD error. While no slot has p > 0 there is nothing to prefer, and q is exactly uniform.

    With the TD boost ``negative_priority``, the p of a No, leads from the paper's priority, where
    |δ| counts among praised slots only (0), to prioritized experience replay (1).

    Every batch comes with ``priority_weight`` = (N q)^−β, float32, the weight of the mixture that
    was drawn from (at most (1 − λ)^−β, so no minimum over the buffer is tracked), and with
    ``sampling_probability`` = q, float64. With ``lmbda=1, td_boost=True, unscored_priority=1`` it
    is prioritized experience replay, with weights before TorchRL's division by the greatest one.

    A slot that is (over)written is unscored and unvisited. Unscored, its p is
    ``unscored_priority``; unvisited, its |δ| is the greatest |δ| seen before it was written, and at
    least 1, as TorchRL's. Of several scores of one slot (clips may overlap) the greatest counts.

    Args:
        max_capacity: Slots of the storage.
        lmbda: λ in [0, 1], the share of draws that follow the judge; torchrl's ``LinearScheduler``
            can drive it. The paper's is at most 0.5; 0 is uniform replay.
        alpha: α >= 0, exponent of the priority.
        beta: β >= 0, exponent of the weight; 0 (as in the paper) switches it off.
        eps: ε >= 0, keeps every slot drawable under λ = 1. With a million slots scored 0 and one
            positive 32-step clip, q^P gives the clip 99.8 % at 1e-12 and 67 % at 1e-8 (α = 0.6).
        td_boost: Multiply p by |δ| (the paper: in continuous control).
        threshold: Score from which the judge said Yes, p = 1, else No; None takes the score s
            itself: p = n + (1 - n) s with n the ``negative_priority``.
        negative_priority: p of a No, in [0, 1]; 0 as in the paper.
        unscored_priority: p̄ in [0, 1], p of a slot that has no score yet.
        dtype: Of priorities and sums. In float64 a slot takes 24 bytes, and 16 to 32 in the tree.
        device: Of arrays and tree; None follows a CUDA storage and is the CPU else.
        reduction: How a buffer reduces a priority per step of a stored trajectory to one per slot:
            ``"max"``, ``"min"``, ``"median"`` or ``"mean"``.
        max_priority_within_buffer: The running maximum of |δ| is over the slots that still hold
            it, instead of over all time and 1; it is 1 where none is visited.

    ``lmbda``, ``alpha``, ``beta``, ``td_boost``, ``threshold``, ``negative_priority`` and
    ``unscored_priority`` are attributes that may be set later; all but λ and β then recompute every
    leaf, O(capacity).

    On a GPU neither drawing nor writing waits for it. There a bad value (NaN, out of range, of no
    slot) is left out when it is written, and raises at the next call that reads values anyway:
    :meth:`statistics`, :meth:`probabilities`, :meth:`state_dict`, :meth:`check_valid`. Shapes are
    those of the call, so that a CUDA graph can hold :meth:`sample` and :meth:`update_priority`,
    warmed up and with a generator that the graph knows. Call :meth:`match_storage` before each
    replay (``VLMReplayBuffer.replaying`` does), and capture anew after loading a state.

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
    negative_priority = _Setting(lambda value: is_real(value, 0, 1), "use 0 to 1")
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
        negative_priority: float = 0.0,
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
        self.negative_priority = negative_priority
        self.unscored_priority = unscored_priority
        self._init()

    def _init(self) -> None:
        """Knows of no row. Also how a buffer empties its sampler."""
        slots, device = self._max_capacity, self._device or torch.device("cpu")
        try:  # the tree last: its C++ does not say no to what is too much
            torch.empty(6 * slots, dtype=self.dtype, device=device)
            self._sum_tree = make_sum_tree(slots, self.dtype, device)
            # On the CPU an index behind the slots is found out by the arrays' length.
            length = slots if self._on_cpu else self._sum_tree.nowhere + 1
            self._score, self._p, self._td_error = (
                torch.full((length,), value, dtype=self.dtype, device=device)
                for value in (UNSCORED, EMPTY, NO_ROW)
            )
        except (RuntimeError, MemoryError, TypeError):
            require(False, "max_capacity", slots, "use what fits the memory, 50 bytes a slot")
        self._positive, self._max_priority = 0, None
        if not self._on_cpu:
            self._positive = torch.zeros((), dtype=torch.long, device=device)
            self._max_priority = torch.full((), -1.0, dtype=self.dtype, device=device), None
        self._any_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._rows, self._told_of = 0, None
        self._drawn_with = torch.zeros(4, dtype=torch.float64, device=device)
        self._just_marked: Any = None

    # What is known of each slot. Score and |δ| are told; all else follows from them and the
    # settings. Kept beside them for speed: p, the leaves (p + ε)^α or (p |δ| + ε)^α (0 without a
    # row), and two counts. Off the CPU the arrays go on behind the slots, to the tree's `nowhere`,
    # which takes what is not to be written: boolean indices would wait for the device.
    _score: Tensor
    _td_error: Tensor  # |δ| of a visited slot; of another one minus what stands in for it
    _p: Tensor
    _sum_tree: SumTree
    _rows: int  # number of slots that hold a row; off the CPU -1 if that would have to be read
    _positive: Any  # of them: with p > 0; off the CPU a tensor
    _max_priority: Any  # TorchRL's: the greatest |δ| (off the CPU a tensor, -1: none) and its slot
    _any_bad: Tensor  # whether a bad value was left out
    _drawn_with: Tensor  # float64 [4]: rows, rows - 1, λ and -β where a captured graph reads them
    _told_of: Any  # the same, as it was written there

    @property
    def _on_cpu(self) -> bool:
        """Whether values can be read without waiting for a device."""
        return self._sum_tree.device.type == "cpu"

    @property
    def scored(self) -> Tensor:
        """Which slots have a score, bool ``[N]``."""
        return self._score[: self._max_capacity] >= 0.0

    @property
    def positive(self) -> Tensor:
        """Which slots the judge said Yes for, or gave a raw score above 0, bool ``[N]``."""
        score = self._score[: self._max_capacity]
        return score > 0.0 if self._threshold is None else score >= self._threshold

    @property
    def visited(self) -> Tensor:
        """Which slots have a TD error since they were written, bool ``[N]``."""
        return self._td_error[: self._max_capacity] >= 0.0

    @property
    def uses_td_error(self) -> bool:
        """Whether draws depend on the TD errors passed to :meth:`update_priority`."""
        return bool(self._td_boost)

    def _judge(self, score: Tensor) -> Tensor:
        """The p of scores ``[B]``, none of them missing."""
        yes = score if self._threshold is None else (score >= self._threshold).to(self.dtype)
        p: Tensor = yes * (1.0 - self._negative_priority) + self._negative_priority
        return p

    def _leaf(self, p: Tensor, td_error: Tensor) -> Tensor:
        """The leaf of p and |δ|, ``[B]`` each; overwrites p."""
        if self._td_boost:
            p.mul_(td_error)
        return p.add_(self._eps).pow_(self._alpha)

    def _derive(self) -> Tensor:
        """Sets all p and their count by scores and rows; returns the leaves that follow."""
        score, td_error = self._score[: self._max_capacity], self._td_error[: self._max_capacity]
        empty = td_error == NO_ROW
        p = torch.where(self.scored, self._judge(score), self._unscored_priority)
        self._p[: self._max_capacity] = p.masked_fill_(empty, EMPTY)
        self._count_positive(p)
        return self._leaf(p, td_error.abs()).masked_fill_(empty, 0.0)

    def _count_positive(self, p: Tensor) -> None:
        positive = (p > 0.0).sum()
        self._positive = int(positive) if self._on_cpu else self._positive.copy_(positive)

    def _rejudge(self) -> None:
        """Has everything follow a changed setting."""
        every = torch.arange(self._max_capacity, device=self._p.device)
        self._sum_tree.update(every, self._derive())

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
        self._match(slots)
        rng, device = self._rng, self._p.device
        source = device if rng is None else rng.device
        draw = torch.rand(batch_size, dtype=torch.float64, device=source, generator=rng)
        # q(i) = λ q^P(i) + (1 − λ)/N with q^P(i) = leaf(i) / Σ leaf. The density is N q.
        if isinstance(self._sum_tree, CompiledSumTree):
            arrays = self._draw_in_numpy(self._sum_tree, draw.numpy(), slots)
            index, weight, probability = map(torch.from_numpy, arrays)
        else:
            index, weight, probability = self._draw(sent(draw, device))
        home = getattr(storage, "device", None)
        if home != device:
            home = torch.device("cpu" if home in (None, "auto") else home)
            index, weight, probability = (sent(t, home) for t in (index, weight, probability))
        info = {WEIGHT: weight, PROBABILITY: probability}
        return (unraveled(index, storage.shape) if storage.ndim > 1 else index), info

    def _draw_in_numpy(
        self, tree: CompiledSumTree, draw: np.ndarray, slots: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, weights and q, ``[B]`` each, for uniform numbers in [0, 1)."""
        lmbda, total = self._mixture(self._lmbda)
        if lmbda > 0.0:
            slot, density = tree.mix(draw, slots, lmbda, total)
            density *= lmbda * slots / total
            density += 1.0 - lmbda
        else:
            slot = (draw * slots).astype(np.int64)
            np.minimum(slot, slots - 1, out=slot)
            density = np.ones_like(draw)
        weight = (density**-self._beta).astype(np.float32)
        density /= slots
        return slot, weight, density

    def _draw(self, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same in tensors of fixed shapes; nothing is waited for."""
        rows, last, lmbda, minus_beta = self._drawn_with.unbind()
        lmbda, total = self._mixture(lmbda)
        uniform = 1.0 - lmbda
        by_leaf = self._sum_tree.find((1.0 - draw).mul_(total / lmbda).to(self.dtype))
        slot = (draw * (rows / uniform)).fmin(last).long()
        index = torch.where(draw < uniform, slot, by_leaf)
        density = torch.addcmul(uniform, self._sum_tree[index].double(), lmbda * rows / total)
        return index, density.pow(minus_beta).float(), density.div_(rows)

    def _mixture(self, lmbda: Any) -> tuple[Any, Any]:
        """λ, or 0 while there is nothing to prefer, and the tree's total.

        They are numbers on the CPU, except for the radix tree, and 0-dimensional tensors else.
        """
        if isinstance(self._sum_tree, CompiledSumTree):
            total = self._sum_tree.total() if lmbda > 0.0 and self._positive else 0.0
            return (lmbda, total) if total > 0.0 else (0.0, 1.0)  # 0: eps=0, all |δ| 0
        total = self._sum_tree.total().double()
        prefers = self._positive * total > 0.0
        return lmbda * prefers, total.clamp_min(torch.finfo(self.dtype).tiny)

    def _density(self, index: Tensor, rows: Any) -> Tensor:
        """N q^P of slots ``[B]``, float64; 1 while there is nothing to prefer."""
        prefers, total = self._mixture(1.0)
        density: Tensor = self._sum_tree[index].double() * (prefers * rows / total)
        return density.add_(1.0 - prefers)

    def probabilities(self, length: int) -> Tensor:
        """The probability q of every slot, float64 ``[length]``, in closed form.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Raises:
            ValueError: ``length`` is 0 or more than the sampler has slots.
        """
        require(is_whole(length, 1, self._max_capacity), "length", length, "use len(buffer)")
        self._raise_refused()
        mixture = self._mixture(torch.tensor(self._lmbda, dtype=torch.float64))
        lmbda, total = map(float, mixture)
        leaves = self._sum_tree.leaves()[:length].double()
        return leaves.mul_(lmbda / total).add_((1.0 - lmbda) * self._rest_of(length))

    def _rest_of(self, length: int) -> Any:
        """The probability of each slot in the draws that do not follow the judge."""
        return 1.0 / length

    def statistics(self, length: int) -> dict[str, float]:
        """Figures for a logger, in one O(N) pass.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Returns:
            ``share_scored``: slots with a score; ``share_positive``: those of :attr:`positive`;
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
        names = *_MOVING, "td_boost", "threshold", "negative_priority", "unscored_priority"
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
        most = _greatest_priority(self.dtype, self._max_capacity, self._alpha)
        if self._visit_in_numpy(index, priority, most):
            return
        slot, values = self._told(index, storage, priority, "priority", most)
        if slot.numel() == 0:
            return
        self._raise_maximum(values.max(), slot, values)
        values = values[last_of_duplicates(slot, len(self._p))]
        self._td_error[slot] = values
        self._restore_maximum(slot)
        if self._td_boost:
            self._sum_tree.update(slot, self._leaf(self._p[slot], values))

    def _visit_in_numpy(self, index: Any, priority: Any, most: float) -> bool:
        """What :meth:`update_priority` mostly is: good values of written slots, on the CPU.

        False: it is something else, and nothing was done.
        """
        tree = self._sum_tree
        if not (
            isinstance(tree, CompiledSumTree)
            and isinstance(index, Tensor)
            and isinstance(priority, Tensor)
            and index.dtype == torch.long
            and priority.dtype in (torch.float32, self.dtype)
            and index.ndim == 1
            and priority.numel() == index.numel() > 0
            and index.device.type == "cpu" == priority.device.type
        ):
            return False
        slot = index.contiguous().numpy()
        values = priority.detach().numpy().reshape(-1).astype(tree.numpy_dtype, copy=False)
        # The reductions of numpy themselves: what is round them costs as much. Unsigned, a
        # negative index is beyond any slot.
        low, high = np.minimum.reduce(values), np.maximum.reduce(values)
        if not (low >= 0.0 and high <= most):  # a NaN is in both
            return False
        if np.maximum.reduce(slot.view(np.uint64)) >= self._max_capacity:
            return False
        p = self._p.numpy()[slot]
        if self._rows != self._max_capacity and np.minimum.reduce(p) < 0.0:
            return False
        self._td_error.numpy()[slot] = values
        if self._td_boost:
            p *= values
            p += self._eps
            p **= self._alpha
            tree.set(slot, p)
        self._raise_maximum(high, slot, values)
        self._restore_maximum(index)
        self._just_marked = None
        return True

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
        slot, values = self._told(index, storage, score, "score", 1.0)
        if slot.numel() == 0:
            return
        self._score.scatter_reduce_(0, slot, values, "amax")  # any score is above none
        slot, once = self._distinct(slot)
        p = self._judge(self._score[slot])
        self._put_p(slot, p, once)
        self._sum_tree.update(slot, self._leaf(p, self._td_error[slot].abs_()))

    def _distinct(self, slot: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each slot once; off the CPU the slots as they are, and a mask of one item of each."""
        if self._on_cpu:
            return slot.unique(), None
        item = torch.arange(len(slot), device=slot.device)
        once = last_of_duplicates(slot, len(self._p)) == item
        return slot, once.logical_and_(slot < self._max_capacity)

    def _put_p(self, slot: Tensor, p: Tensor, once: Tensor | None) -> None:
        """Gives the slots of :meth:`_distinct` their p ``[B]``, the same to duplicates; counts."""
        before, now = self._p.index_select(0, slot) > 0.0, p > 0.0
        if once is not None:
            before, now = before & once, now & once
        change = now.count_nonzero() - before.count_nonzero()
        self._positive += int(change) if self._on_cpu else change
        self._p.index_copy_(0, slot, p)

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Makes slots that were (over)written unscored and unvisited.

        Index, storage and IndexError are as of :meth:`update_priority`.
        """
        self._reset(self._told(index, storage)[0])
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
        behind the rows were emptied by another buffer of the storage. :meth:`sample` does this;
        a captured CUDA graph of it cannot, nor hear of a new λ or β, and wants it before a replay.
        """
        self._maybe_init_from_storage(storage)
        self._match(len(storage))

    def _match(self, rows: int) -> None:
        if self._rows != rows:
            slots, fresh = self._max_capacity, self._p[:rows] == EMPTY
            every, leaves = torch.arange(slots, device=self._p.device), self._sum_tree.leaves()
            stand_in, leaf = self._stand_in()
            for array, of_fresh, of_none in (
                (self._score, UNSCORED, UNSCORED),
                (self._p, self._unscored_priority, EMPTY),
                (self._td_error, -stand_in, NO_ROW),
                (leaves, leaf, 0.0),
            ):
                array[:rows] = torch.where(fresh, of_fresh, array[:rows])
                array[rows:slots].fill_(of_none)
            self._sum_tree.update(every, leaves)
            self._count_positive(self._p[:rows])
            self._restore_maximum(every[rows:])
            self._rows = rows
        if not isinstance(self._sum_tree, CompiledSumTree):
            drawn_with = rows, rows - 1, self._lmbda, -self._beta
            if drawn_with != self._told_of:
                for place, value in enumerate(drawn_with):
                    self._drawn_with[place].fill_(value)
                self._told_of = drawn_with

    def _stand_in(self) -> tuple[Any, Any]:
        """What stands in for the |δ| of an unvisited slot, and the leaf of such a one, unscored."""
        # It must be above 0, since its minus sign says that it is no |δ|.
        stand_in, tiny = self.default_priority, torch.finfo(self.dtype).tiny
        if isinstance(stand_in, Tensor):
            stand_in = stand_in.clamp_min(tiny)
        else:
            stand_in = max(float(stand_in), tiny)
        mass = self._unscored_priority * (stand_in if self._td_boost else 1.0) + self._eps
        return stand_in, mass**self._alpha

    def _reset(self, slot: Tensor) -> None:
        """Makes slots, int64 ``[B]``, hold a row of which nothing is known."""
        if slot.numel() == 0:
            return
        stand_in, leaf = self._stand_in()
        slot, once = self._distinct(slot)
        if self._rows != self._max_capacity:
            added = self._p[slot] == EMPTY
            self._rows = self._rows + int(added.sum()) if self._on_cpu else -1
        self._score.index_fill_(0, slot, UNSCORED)
        filled = torch.empty_like(slot, dtype=self.dtype)
        self._put_p(slot, filled.fill_(self._unscored_priority), once)
        self._td_error.index_copy_(0, slot, filled.fill_(-stand_in))
        self._sum_tree.update(slot, filled.fill_(leaf))
        self._restore_maximum(slot)

    @property
    def default_priority(self) -> Any:
        """The |δ| that stands in for one in a slot that is written now.

        Off the CPU a 0-dimensional tensor.
        """
        within = self._max_priority_within_buffer
        if not self._on_cpu:
            greatest = self._greatest()
            return torch.where(greatest < 0.0, 1.0, greatest) if within else greatest.clamp_min(1.0)
        greatest = self._max_priority[0]
        return greatest if within and greatest is not None else max(1.0, greatest or 0.0)

    def _greatest(self) -> Tensor:
        """The greatest |δ|, below 0 before the first; off the CPU."""
        if self._max_priority_within_buffer:
            return self._td_error[: self._max_capacity].max()
        greatest: Tensor = self._max_priority[0]
        return greatest

    def _raise_maximum(self, high: Any, slot: Any, values: Any) -> None:
        """Has the maximum take in |δ| ``[B]`` of slots, of which ``high`` is the greatest."""
        greatest = self._max_priority[0]
        if isinstance(greatest, Tensor):
            torch.maximum(greatest, high, out=greatest)
        elif greatest is None or high > greatest:
            self._max_priority = float(high), int(slot[values.argmax()])

    def _restore_maximum(self, index: Tensor) -> None:
        """Within the buffer: finds the greatest |δ| anew if its slot is in ``index``."""
        holder = self._max_priority[1] if self._max_priority_within_buffer else None
        if holder is None or not bool((index == holder).any()):
            return
        value, slot = self._td_error.max(0)
        self._max_priority = (float(value), int(slot)) if value >= 0.0 else None

    def _told(
        self, index: Any, storage: Any, values: Any = None, name: str = "", most: float = 0.0
    ) -> tuple[Tensor, Any]:
        """Slots ``[K]`` that a call names, and one value in [0, ``most``] for each, in ``dtype``.

        Slots that values are told of were written, even if nobody announced it: the storage came
        with data. Without values the slots are announced, and may be new.
        """
        self._maybe_init_from_storage(storage)
        self._just_marked = None
        device = self._p.device
        slot = sent(as_index(index, "index"), device)
        slot = raveled(slot, storage) if slot.ndim > 1 else slot.reshape(-1)
        if values is not None:
            values = sent(as_numbers(values, name), device).detach().to(self.dtype).reshape(-1)
            if values.numel() not in (1, slot.numel()):  # in TorchRL's words and kind
                raise RuntimeError(
                    f"{name} should be a number or an iterable of the same length as index: "
                    f"got {name} of shape {tuple(values.shape)} for {slot.numel()} indices."
                )
            values = values.expand(slot.shape)
        if self._on_cpu:
            return self._checked(slot, values, name, most)
        return self._masked(slot, values, storage, most)

    def _checked(self, slot: Tensor, values: Any, name: str, most: float) -> tuple[Tensor, Any]:
        """On the CPU: what is bad raises, and what is to be skipped is left out."""
        if slot.numel():
            low, high = (bound.item() for bound in torch.aminmax(slot))
            if low < -1 or high >= self._max_capacity:
                raise IndexError(
                    f"index {low if low < -1 else high} is no slot of a sampler of capacity "
                    f"{self._max_capacity}: pass the indices that extend or sample returned."
                )
            if low < 0:
                kept = slot >= 0
                slot, values = slot[kept], None if values is None else values[kept]
        if slot.numel() and values is not None:
            least, greatest = (bound.item() for bound in torch.aminmax(values))
            bad = least if not least >= 0.0 else greatest  # a NaN is both
            require(least >= 0.0 and greatest <= most, name, bad, _BAD_VALUE)
            if self._rows != self._max_capacity:
                self._reset(slot[self._p[slot] == EMPTY])
        return slot, values

    def _masked(self, slot: Tensor, values: Any, storage: Any, most: float) -> tuple[Tensor, Any]:
        """Off the CPU: both are sent ``nowhere``, and what was bad raises later."""
        slots, nowhere = self._max_capacity, self._sum_tree.nowhere
        if values is not None and storage is not None and len(storage):
            self._match(len(storage))
            slots = self._rows
        lost = slot.clamp(0, slots - 1) != slot
        if values is not None:
            lost |= values.clamp(0.0, most) != values  # also a NaN
            values = values.masked_fill(lost, 0)
        self._any_bad |= (lost & (slot != -1)).any()
        slot = slot.masked_fill(lost, nowhere)
        if values is not None and storage is None and self._rows != self._max_capacity:
            self._reset(torch.where(self._p[slot] == EMPTY, slot, nowhere))
        return slot, values

    def _raise_refused(self) -> None:
        """Tells of bad values that were left out since the last time, off the CPU."""
        if self._any_bad:
            self._any_bad.fill_(False)
            raise ValueError(f"a score, |δ| or index was bad and left out: {_BAD_VALUE}")

    # ---------------------------------------------------------------- saving and moving

    def state_dict(self) -> dict[str, Any]:
        """A copy of what the next draw follows from, but for the buffer's generator."""
        self._raise_refused()
        slots, maximum = self._max_capacity, self._max_priority
        if not self._on_cpu:
            value = float(self._greatest())
            maximum = (value, int(self._td_error[:slots].argmax())) if value >= 0.0 else (None,) * 2
        return {
            **{name: getattr(self, name) for name in (*_FIXED, *_MOVING)},
            "_max_priority": maximum,
            "_score": self._score[:slots].clone(),
            "_td_error": self._td_error[:slots].clone(),
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

    def _require_form(self, state: Any) -> None:
        """Refuses what is no state of such a sampler, whatever the numbers in its arrays."""
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
            fits = isinstance(array, Tensor) and array.shape == (self._max_capacity,)
            fits = fits and array.dtype == self.dtype
            require(fits, f"{of}'s {name}", array, f"pass {self._max_capacity} of {self.dtype}")
        maximum = state["_max_priority"]
        pair = isinstance(maximum, (tuple, list)) and len(maximum) == 2
        fits = pair and (
            (is_real(maximum[0], 0) and is_whole(maximum[1], 0, self._max_capacity - 1))
            or (maximum[0] is None and maximum[1] is None)
        )
        require(fits, f"{of}'s _max_priority", maximum, damaged)

    def _restore(self, state: Any, device: torch.device) -> None:
        self._require_form(state)
        slots, (value, holder) = self._max_capacity, state["_max_priority"]
        loaded = object.__new__(type(self))
        loaded.__dict__.update(self.__dict__, _device=device)
        loaded._init()
        loaded.__dict__.update({f"_{name}": state[name] for name in _MOVING}, _device=self._device)
        score, td_error = loaded._score[:slots], loaded._td_error[:slots]
        score.copy_(state["_score"])
        td_error.copy_(state["_td_error"])
        leaf, leaves = loaded._derive(), state["_sum_tree"].to(device)
        loaded._sum_tree.update(torch.arange(slots, device=device), leaves)
        scored, visited, written = loaded.scored, loaded.visited, td_error != NO_ROW
        value = -1.0 if value is None else value
        if loaded._on_cpu:
            loaded._rows, loaded._max_priority = int(written.sum()), state["_max_priority"]
        else:
            loaded._rows = -1
            loaded._max_priority[0].fill_(value)

        greatest = float(td_error[visited].max()) if visited.any() else -1.0
        ulps = 64.0 * torch.finfo(self.dtype).eps
        held = holder is None or not self._max_priority_within_buffer
        for holds, fault in (
            ((scored & (score <= 1.0) | (score == UNSCORED)).all(), "a score outside [0, 1]"),
            ((td_error.isfinite() | ~written).all(), "a TD error that is not finite"),
            (not (scored & ~written).any(), "a score of a slot never written"),
            (torch.allclose(leaves, leaf, rtol=ulps, atol=0.0), "a leaf off its formula"),
            (greatest <= value, "a TD error above the running maximum"),
            (held or td_error[holder] == value, "a running maximum of a slot without it"),
        ):
            require(bool(holds), "sampler state", f"with {fault}", "the state is damaged")
        self.__dict__.update(loaded.__dict__)

    def _maybe_init_from_storage(self, storage: Any) -> None:
        """Moves to the storage's device where the sampler was given none, keeping its state."""
        here = self._p.device
        if getattr(storage, "device", None) == here:
            return
        device = self._tree_device_from_storage(storage)
        if device is not None and device != here:
            device = checked_device(device, here=True)  # "cuda" may be here, too
            if device != here:
                self._restore(self.state_dict(), device)

    def check_valid(self) -> None:
        """Looks whether scores, |δ| and all that follows from them agree, in one O(N) pass.

        Raises:
            ValueError: They do not; the message names what is off.
        """
        twin = copy(self)
        twin.load_state_dict(self.state_dict())
        slots = self._max_capacity
        same = torch.equal(self._p[:slots], twin._p[:slots])
        require(same, "_p", self._p, "it is off what the scores give")
        rows, positive = int((self._td_error[:slots] > NO_ROW).sum()), int(twin._positive)
        require(self._rows in (rows, -1), "_rows", self._rows, f"{rows} slots hold one")
        mine = int(self._positive)
        require(mine == positive, "_positive", mine, f"the scores give {positive}")
        total, ulps = float(self._sum_tree.total()), 64.0 * torch.finfo(self.dtype).eps
        summed = float(self._sum_tree.leaves().double().sum())
        require(abs(total - summed) <= ulps * summed, "the tree's total", total, f"sum is {summed}")


@lru_cache
def _greatest_priority(dtype: torch.dtype, slots: int, alpha: float) -> float:
    """With it in all slots the total of the leaves is still finite."""
    greatest: float = (torch.finfo(dtype).max / slots) ** (1.0 / max(alpha, 1.0))
    return greatest
