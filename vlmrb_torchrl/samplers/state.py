"""What is known of each slot, and how it is saved, restored and checked.

N: slots of the sampler.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from vlmrb_torchrl.checks import is_real, is_whole, shown
from vlmrb_torchrl.samplers.trees import DTYPES, SumTree, make_sum_tree

# A slot without a score, in the score array; a slot never written, in the array of p.
UNSCORED = -1.0
EMPTY = -1.0

_FILE = "sampler.pt"
_VERSION = 1
# Fixed at construction: a state of another value describes another distribution.
_FIXED = ("_max_capacity", "dtype", "_eps", "td_boost", "threshold", "unscored_priority")
# Restored: a scheduler may have moved them, writes have.
_RESTORED = ("_lmbda", "_alpha", "_beta", "_written", "_scored", "_positive", "_max_priority")
_FITS: dict[str, Callable[[Any, int], bool]] = {
    "_lmbda": lambda value, slots: is_real(value, 0, 1),
    "_alpha": lambda value, slots: is_real(value, 0),
    "_beta": lambda value, slots: is_real(value, 0),
    "_written": lambda value, slots: is_whole(value, 0, slots),
    "_scored": lambda value, slots: is_whole(value, 0, slots),
    "_positive": lambda value, slots: is_whole(value, 0, slots),
    "_max_priority": lambda value, slots: (
        value is None or (isinstance(value, (tuple, list)) and len(value) == 2)
    ),
}
_ARRAYS = ("_score", "_p", "_td_error", "_sum_tree")


class SlotState(PrioritizedSampler):
    """Per slot a score, the p that follows from it, and a TD error; over all slots a sum tree.

    The part of ``VLMPrioritizedSampler`` that holds data. Its tree's leaf is (p + ε)^α, or
    (p |δ| + ε)^α, of the slots written so far, and 0 of the others.
    """

    _max_capacity: int
    _device: torch.device | None
    _eps: float
    _alpha: float
    _max_priority: Any  # (greatest |δ|, its slot), or (None, None)
    dtype: torch.dtype
    td_boost: bool
    threshold: float | None
    unscored_priority: float

    def _init(self) -> None:
        device = self._device or torch.device("cpu")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or float64, got dtype={shown(self.dtype)}")
        slots = (self._max_capacity,)
        try:  # the tree last: its C++ does not say no to what is too much
            self._score = torch.full(slots, UNSCORED, dtype=self.dtype, device=device)
            self._p = torch.full(slots, EMPTY, dtype=self.dtype, device=device)
            # |δ| of a visited slot; of another one minus what stands in for it.
            self._td_error = torch.full(slots, -1.0, dtype=self.dtype, device=device)
            self._sum_tree: SumTree = make_sum_tree(self._max_capacity, self.dtype, device)
        except (RuntimeError, MemoryError, TypeError):
            raise ValueError(
                f"max_capacity must fit the memory, some 50 bytes a slot, got max_capacity="
                f"{self._max_capacity}"
            ) from None
        self._written = 0  # slots that were ever written
        self._scored = 0  # of them: slots with a score
        self._positive = 0  # of them: slots with p > 0
        self._max_priority = None
        self._just_marked: Any = None

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

    def _judge(self, score: Tensor) -> Tensor:
        """The p of scores ``[B]``, none of them missing."""
        if self.threshold is None:
            return score
        return (score >= self.threshold).to(self.dtype)

    def _refresh(self, index: Tensor) -> None:
        """Brings the leaves of the slots ``index`` ``[B]`` up to date with the arrays."""
        leaf = self._leaf(self._p[index], self._td_error[index].abs_())
        self._sum_tree.update(index, leaf)

    def _leaf(self, p: Tensor, td_error: Tensor) -> Tensor:
        """The leaf of p and |δ|, ``[B]`` each; overwrites p."""
        if self.td_boost:
            p.mul_(td_error)
        return p.add_(self._eps).pow_(self._alpha)

    # ---------------------------------------------------------------- saving and moving

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that decides the next draw, but for the buffer's generator."""
        return {
            "_version": _VERSION,
            **{name: getattr(self, name) for name in (*_FIXED, *_RESTORED)},
            "_score": self._score.clone(),
            "_p": self._p.clone(),
            "_td_error": self._td_error.clone(),
            # Leaves as they are: recomputed ones can differ in the last bit, since a vectorised
            # power rounds otherwise than the scalar one at a batch's end.
            "_sum_tree": self._sum_tree.leaves(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, on this sampler's device and kind of tree.

        Raises:
            ValueError: The state is of another version, capacity or configuration, or is damaged;
                nothing changed.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"sampler state is {shown(state_dict)}: pass what state_dict returned."
            )
        version = state_dict.get("_version")
        if version != _VERSION:
            raise ValueError(
                f"sampler state has version {shown(version)}, this code reads {_VERSION}: "
                "load it with the code that saved it."
            )
        if lacks := [name for name in (*_FIXED, *_RESTORED, *_ARRAYS) if name not in state_dict]:
            raise ValueError(f"sampler state has no {', '.join(lacks)}: it is damaged.")
        for name in _FIXED:
            if state_dict[name] != getattr(self, name):
                known_as, theirs = name.removeprefix("_"), shown(state_dict[name])
                raise ValueError(
                    f"sampler state has {known_as}={theirs}, this sampler has "
                    f"{getattr(self, name)}: build it with {known_as}={theirs}."
                )
        for name in _ARRAYS:
            self._check_array(name, state_dict[name])
        for name, fits in _FITS.items():
            if not fits(state_dict[name], self._max_capacity):
                raise ValueError(
                    f"sampler state has {name}={shown(state_dict[name])}: the state is damaged."
                )
        for name in _RESTORED:
            setattr(self, name, state_dict[name])
        self._just_marked = None
        self._place(state_dict, self._score.device)

    def _check_array(self, name: str, array: Any) -> None:
        """Refuses what `state_dict` cannot have put there; -1 stands for what is missing."""
        fits = isinstance(array, Tensor) and array.shape == (self._max_capacity,)
        if not fits or array.dtype != self.dtype or not bool(array.isfinite().all()):
            raise ValueError(
                f"sampler state has {name}={shown(array)} or values that are not finite, this "
                f"sampler has {self._max_capacity} slots of {self.dtype}: the state is damaged."
            )

    def _place(self, state: dict[str, Any], device: torch.device) -> None:
        self._score = state["_score"].to(device, copy=True)
        self._p = state["_p"].to(device, copy=True)
        self._td_error = state["_td_error"].to(device, copy=True)
        self._sum_tree = make_sum_tree(self._max_capacity, self.dtype, device)
        every = torch.arange(self._max_capacity, device=device)
        self._sum_tree.update(every, state["_sum_tree"].to(device))

    def _maybe_init_from_storage(self, storage: Any) -> None:
        """Moves to the storage's device where the sampler was given none, keeping its state."""
        device = self._tree_device_from_storage(storage)
        if device is not None and device != self._score.device:
            self._place(self.state_dict(), device)

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
        self.load_state_dict(torch.load(Path(path) / _FILE, map_location="cpu", weights_only=True))

    # ---------------------------------------------------------------- checking

    def check_valid(self) -> None:
        """Asserts the invariants between arrays, counts and tree, in one O(N) pass.

        Raises:
            AssertionError: One does not hold; the message names it.
        """
        written, scored, visited = self._p != EMPTY, self.scored, self.visited
        in_range = scored & (self._score <= 1.0) | (self._score == UNSCORED)
        assert bool(in_range.all()), "a score is neither in [0, 1] nor missing"
        assert bool(self._td_error.isfinite().all()), "a TD error is not finite"
        assert not bool((scored | visited)[~written].any()), "a slot never written has a score"
        p = torch.where(scored, self._judge(self._score), self.unscored_priority)
        assert torch.equal(self._p[written], p[written]), "a p is off its score"
        assert self._written == int(written.sum()), "the count of written slots is off"
        assert self._scored == int(scored.sum()), "the count of scored slots is off"
        positive = scored & (self._p > 0.0)
        assert self._positive == int(positive.sum()), "the count of positive slots is off"
        self._check_tree(written)
        if visited.any():
            greatest = float(self._td_error[visited].max())
            assert self._max_priority[0] >= greatest, "the running maximum is below a TD error"

    def _check_tree(self, written: Tensor) -> None:
        leaves = self._sum_tree.leaves()
        formula = self._leaf(self._p.clone(), self._td_error.abs()).masked_fill_(~written, 0.0)
        ulps = 64.0 * torch.finfo(self.dtype).eps
        assert torch.allclose(leaves, formula, rtol=ulps, atol=0.0), "a leaf is off its formula"
        total, summed = self._sum_tree.total(), float(leaves.double().sum())
        assert abs(total - summed) <= ulps * summed, "the tree's total is off its leaves"
