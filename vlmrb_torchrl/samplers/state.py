"""What a sampler with scores shows of itself: its state, its statistics, its invariants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from vlmrb_torchrl.samplers.trees import SumTree, make_sum_tree

_FILE = "sampler.pt"
_VERSION = 1
# Fixed at construction: a state of another value describes another distribution.
_FIXED = ("_max_capacity", "dtype", "_eps", "td_boost", "threshold", "unscored_priority")
# Restored: a scheduler may have moved them.
_RESTORED = ("_lmbda", "_alpha", "_beta", "_written", "_scored", "_positive", "_max_priority")


class SamplerState(PrioritizedSampler):
    """Saving, loading and checking a :class:`VLMPrioritizedSampler`; a part of that class."""

    _sum_tree: SumTree
    _score: Tensor
    _td_error: Tensor
    _max_capacity: int
    _written: int
    _scored: int
    _positive: int
    _lmbda: float
    _max_priority: Any  # (greatest |δ|, its slot), or (None, None)
    _max_priority_within_buffer: bool
    dtype: torch.dtype

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that decides the next draw, but for the buffer's generator."""
        state = {name: getattr(self, name) for name in (*_FIXED, *_RESTORED)}
        return {
            "_version": _VERSION,
            **state,
            "_score": self._score.clone(),
            "_td_error": self._td_error.clone(),
            # Leaves as they are: recomputed ones can differ in the last bit, since a vectorised
            # power rounds otherwise than the scalar one at a batch's end.
            "_sum_tree": self._sum_tree.leaves(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, on this sampler's device and kind of tree.

        Raises:
            ValueError: The state is of another version, capacity or configuration; nothing changed.
        """
        version = state_dict.get("_version")
        if version != _VERSION:
            raise ValueError(
                f"sampler state has version {version}, this code reads {_VERSION}: "
                "load it with the code that saved it."
            )
        for name in _FIXED:
            if state_dict[name] != getattr(self, name):
                shown = name.removeprefix("_")
                raise ValueError(
                    f"sampler state has {shown}={state_dict[name]}, this sampler "
                    f"{getattr(self, name)}: build it with {shown}={state_dict[name]}."
                )
        for name in _RESTORED:
            setattr(self, name, state_dict[name])
        device = self._score.device
        self._score = state_dict["_score"].to(device, copy=True)
        self._td_error = state_dict["_td_error"].to(device, copy=True)
        self._plant(state_dict["_sum_tree"], device)

    def _plant(self, leaves: Tensor, device: torch.device) -> None:
        """Builds the tree on ``device`` with these leaves."""
        self._sum_tree = make_sum_tree(self._max_capacity, self.dtype, device)
        every = torch.arange(self._max_capacity, device=device)
        self._sum_tree.update(every, leaves.to(device))

    def _maybe_init_from_storage(self, storage: Any) -> None:
        """Moves to the storage's device where the sampler was given none, keeping its state."""
        device = self._tree_device_from_storage(storage)
        if device is None or device == self._score.device:
            return
        leaves = self._sum_tree.leaves()
        self._score, self._td_error = self._score.to(device), self._td_error.to(device)
        self._plant(leaves, device)

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

    def statistics(self, length: int) -> dict[str, float]:
        """Figures for a logger, from one pass over the slots.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Returns:
            ``share_scored``: slots with a score; ``share_positive``: slots with a score and p > 0;
            ``effective_sample_size``: 1 / Σ q², all as a share of N, in [0, 1].
        """
        if length == 0:
            return {"share_scored": 0.0, "share_positive": 0.0, "effective_sample_size": 0.0}
        density = self.probabilities(length) * length
        return {
            "share_scored": self._scored / length,
            "share_positive": self._positive / length,
            "effective_sample_size": float(1.0 / density.square().mean()),
        }

    def probabilities(self, length: int) -> Tensor:
        """The probability q of every slot, float64 ``[length]``, in closed form.

        Args:
            length: Slots written, N = ``len(buffer)``.
        """
        leaves = self._sum_tree.leaves()[:length].double()
        total = leaves.sum()
        lmbda = self._lmbda if self._has_positive() and total > 0.0 else 0.0
        uniform = torch.full_like(leaves, (1.0 - lmbda) / length)
        return uniform.add_(leaves, alpha=float(lmbda / total)) if lmbda else uniform

    def check_valid(self) -> None:
        """Asserts the invariants between arrays, counts and tree, in one O(capacity) pass.

        Raises:
            AssertionError: One does not hold; the message names it.
        """
        empty, leaves = self._score == -2.0, self._sum_tree.leaves()
        valid = empty | (self._score == -1.0) | ((self._score >= 0.0) & (self._score <= 1.0))
        assert bool(valid.all()), "a score is outside [0, 1] and no state either"
        assert bool(self._td_error.isfinite().all()), "a TD error is not finite"
        assert self._written == int((~empty).sum()), "count of written slots is off"
        assert self._scored == int((self._score >= 0.0).sum()), "count of scored slots is off"
        positive = self._is_positive(self._score)
        assert self._positive == int(positive.sum()), "count of positive slots is off"
        expected = self._leaf(self._score, self._td_error)
        expected.masked_fill_(empty, 0.0)
        ulps = 64.0 * torch.finfo(self.dtype).eps
        assert torch.allclose(leaves, expected, rtol=ulps, atol=0.0), "a leaf is off its formula"
        total, summed = self._sum_tree.total(), float(leaves.double().sum())
        assert abs(total - summed) <= ulps * max(total, summed), (
            "the tree's total is off its leaves"
        )
        visited = self._td_error[~self._td_error.signbit()]
        greatest = self._max_priority[0]
        if visited.numel():
            assert greatest >= float(visited.max()), "the running maximum is below a TD error"
