"""What is known of each slot, and how it is saved, restored and checked.

N: slots of the sampler.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from vlmrb_torchrl.checks import is_real, is_whole, shown
from vlmrb_torchrl.samplers.trees import DTYPES, SumTree, make_sum_tree

# A slot without a score, in the score array; a slot that holds no row, in those of p and of |δ|.
UNSCORED = -1.0
EMPTY = -1.0
NO_ROW = -math.inf

_FILE = "sampler.pt"
_VERSION = 2
# Fixed at construction: a state of another value describes another distribution.
_FIXED = ("_max_capacity", "dtype", "_eps", "td_boost", "threshold", "unscored_priority")
# Restored: a scheduler may have moved them, or a TD error.
_FITS: dict[str, Callable[[Any, int], bool]] = {
    "_lmbda": lambda value, slots: is_real(value, 0, 1),
    "_alpha": lambda value, slots: is_real(value, 0),
    "_beta": lambda value, slots: is_real(value, 0),
    "_max_priority": lambda value, slots: (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and (
            (value[0] is None and value[1] is None)
            or (is_real(value[0], 0) and is_whole(value[1], 0, slots - 1))
        )
    ),
}
_ARRAYS = ("_score", "_td_error", "_sum_tree")


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
    _max_priority_within_buffer: bool

    def _init(self) -> None:
        device = self._device or torch.device("cpu")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or float64, got dtype={shown(self.dtype)}")
        slots = (self._max_capacity,)
        try:  # the tree last: its C++ does not say no to what is too much
            self._score = torch.full(slots, UNSCORED, dtype=self.dtype, device=device)
            self._p = torch.full(slots, EMPTY, dtype=self.dtype, device=device)
            # |δ| of a visited slot; of another one minus what stands in for it.
            self._td_error = torch.full(slots, NO_ROW, dtype=self.dtype, device=device)
            self._sum_tree: SumTree = make_sum_tree(self._max_capacity, self.dtype, device)
        except (RuntimeError, MemoryError, TypeError):
            raise ValueError(
                f"max_capacity must fit the memory, some 50 bytes a slot, got max_capacity="
                f"{self._max_capacity}"
            ) from None
        self._written = 0  # slots that hold a row
        self._scored = 0  # of them: slots with a score
        self._positive = 0  # of those: slots with p > 0
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

    def _rejudge(self) -> None:
        """Derives anew what follows from scores and settings: every p, the counts, every leaf."""
        self._derive()
        self._refresh((self._p != EMPTY).nonzero().squeeze(-1))

    def _derive(self) -> None:
        """Every p and the counts, from the scores and from which slots hold a row."""
        written, scored = self._td_error > NO_ROW, self.scored
        p = torch.where(scored, self._judge(self._score), self.unscored_priority)
        self._p = p.masked_fill(~written, EMPTY)
        self._written, self._scored = int(written.sum()), int(scored.sum())
        self._positive = int(self.positive.sum())

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
        """A copy of what the next draw follows from, but for the buffer's generator."""
        return {
            "_version": _VERSION,
            **{name: getattr(self, name) for name in (*_FIXED, *_FITS)},
            "_score": self._score.clone(),
            "_td_error": self._td_error.clone(),
            # Leaves as they are: recomputed ones can differ in the last bit, since a vectorised
            # power rounds otherwise than the scalar one at a batch's end.
            "_sum_tree": self._sum_tree.leaves(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, on this sampler's device and kind of tree.

        Raises:
            ValueError: See :meth:`restored`; nothing changed.
        """
        self.__dict__.update(self.restored(state_dict).__dict__)
        self._just_marked = None

    def restored(self, state_dict: dict[str, Any]) -> SlotState:
        """This sampler as :meth:`load_state_dict` would leave it, beside this one.

        Raises:
            ValueError: The state is of another version, capacity or configuration, or is damaged.
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
        if lacks := [name for name in (*_FIXED, *_FITS, *_ARRAYS) if name not in state_dict]:
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
        loaded = object.__new__(type(self))
        loaded.__dict__.update(self.__dict__)
        for name in _FITS:
            setattr(loaded, name, state_dict[name])
        loaded._place(state_dict, self._score.device)
        if broken := loaded._broken():
            raise ValueError(f"sampler state is damaged: {broken}.")
        return loaded

    def _check_array(self, name: str, array: Any) -> None:
        """Refuses what is no array of numbers for these slots."""
        fits = isinstance(array, Tensor) and array.shape == (self._max_capacity,)
        if not fits or array.dtype != self.dtype:
            raise ValueError(
                f"sampler state has {name}={shown(array)}, this sampler has {self._max_capacity} "
                f"slots of {self.dtype}: the state is damaged."
            )

    def _place(self, state: dict[str, Any], device: torch.device) -> None:
        self._score = state["_score"].to(device, copy=True)
        self._td_error = state["_td_error"].to(device, copy=True)
        self._derive()
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
            ValueError: See :meth:`restored`.
        """
        self.load_state_dict(self.read(path))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The state that :meth:`dumps` wrote into the folder ``path``."""
        state: dict[str, Any] = torch.load(
            Path(path) / _FILE, map_location="cpu", weights_only=True
        )
        return state

    # ---------------------------------------------------------------- checking

    def check_valid(self) -> None:
        """Looks at the invariants between arrays, counts and tree, in one O(N) pass.

        Raises:
            AssertionError: One does not hold; the message names it.
        """
        if broken := self._broken():
            raise AssertionError(broken)

    def _broken(self) -> str | None:
        """The first invariant that does not hold."""
        score, td_error, p = self._score, self._td_error, self._p
        written, scored, visited = td_error != NO_ROW, self.scored, self.visited
        greatest = float(td_error[visited].max()) if visited.any() else -1.0
        maximum, holder = self._max_priority
        leaves, ulps = self._sum_tree.leaves(), 64.0 * torch.finfo(self.dtype).eps
        leaf = self._leaf(p.clone(), td_error.abs()).masked_fill_(~written, 0.0)
        summed = float(leaves.double().sum())
        judged = torch.where(scored, self._judge(score), self.unscored_priority)
        invariants = {
            "a score is neither in [0, 1] nor missing": (
                scored & (score <= 1.0) | (score == UNSCORED)
            ).all(),
            "a TD error is not finite": (td_error.isfinite() | ~written).all(),
            "a slot never written has a score": not (scored & ~written).any(),
            "a p is off its score": torch.equal(p, judged.masked_fill(~written, EMPTY)),
            "the count of written slots is off": self._written == int(written.sum()),
            "the count of scored slots is off": self._scored == int(scored.sum()),
            "the count of positive slots is off": self._positive == int(self.positive.sum()),
            "a leaf is off its formula": torch.allclose(leaves, leaf, rtol=ulps, atol=0.0),
            "the tree's total is off its leaves": (
                abs(self._sum_tree.total() - summed) <= ulps * summed
            ),
            "the running maximum is below a TD error": (
                greatest <= (-1.0 if maximum is None else maximum)
            ),
            "the running maximum is of no slot that holds it": (
                not self._max_priority_within_buffer
                or maximum is None
                or float(td_error[holder]) == maximum
            ),
        }
        return next((text for text, holds in invariants.items() if not holds), None)
