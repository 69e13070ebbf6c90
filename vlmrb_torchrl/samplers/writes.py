"""How slots learn of being written, of their score and of their TD error.

B: items of one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmrb_torchrl.samplers.indices import checked_values, flat_index
from vlmrb_torchrl.samplers.state import EMPTY, NO_ROW, UNSCORED, SlotState
from vlmrb_torchrl.samplers.trees import last_of_duplicates


class SlotWrites(SlotState):
    """The part of ``VLMPrioritizedSampler`` that writes. Refuses a bad call before any write."""

    reduction: str

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
        self._maybe_init_from_storage(storage)
        index, p, stored = self._slots(index, storage)
        if index.numel() == 0:
            return
        # Even with all N slots at this priority the tree's total is finite.
        most = (torch.finfo(self.dtype).max / self._max_capacity) ** (1.0 / max(self._alpha, 1.0))
        values, high = checked_values(priority, index, stored, "priority", most, self.dtype)
        p = self._claim(index, p)
        greatest = self._max_priority[0]
        if greatest is None or high > greatest:
            self._max_priority = (high, int(index[values.argmax()]))
        if index.device.type != "cpu":  # there a scatter writes duplicates in any order
            index, values = last_of_duplicates(index, values)
            p = self._p[index]
        self._td_error.scatter_(0, index, values)
        if self.td_boost:
            self._sum_tree.update(index, self._leaf(p, values))
        if self._max_priority_within_buffer:
            self._restore_maximum(index)

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
        index, p, stored = self._slots(index, storage)
        if index.numel() == 0:
            return
        values, _ = checked_values(score, index, stored, "score", 1.0, self.dtype)
        self._claim(index, p)
        slot, item = index.unique(return_inverse=True)
        before = self._score[slot]
        had_score = before >= 0.0
        after = before.scatter_reduce(0, item, values, "amax")  # none is below 0
        p_before, p_after = self._p[slot], self._judge(after)
        self._score[slot] = after
        self._p[slot] = p_after
        self._scored += int((~had_score).sum())
        self._positive += int((p_after > 0.0).sum()) - int(((p_before > 0.0) & had_score).sum())
        self._refresh(slot)

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Makes slots that were (over)written unscored and unvisited.

        Args:
            index: int or int64 ``[B]``, or ``[B, storage.ndim]``; items with index -1 are skipped.
            storage: Needed for indices of several dimensions.

        Raises:
            IndexError: An index is out of range; nothing was written.
        """
        self._maybe_init_from_storage(storage)
        slot, _ = flat_index(index, storage, self._max_capacity, self._score.device)
        if slot.numel() > 1:
            slot = slot.unique()
        self._reset(slot)
        self._just_marked = index

    def add(self, index: Any) -> None:
        """Same as :meth:`mark_update`, of one slot."""
        self.extend(index)

    def extend(self, index: Any) -> None:
        """Same as :meth:`mark_update`. A no-op right after it with the same tensor.

        That is what a buffer does: its writer marks the slots (giving the storage that indices of
        several dimensions need), then the buffer announces them here.
        """
        if index is not self._just_marked:
            self.mark_update(index)
        self._just_marked = None

    def _reset(self, slot: Tensor) -> None:
        """Resets distinct slots, int64 ``[B]``."""
        if slot.numel() == 0:
            return
        if self._written < self._max_capacity:
            self._written += int((self._p[slot] == EMPTY).sum())
        if self._scored:
            had_score = self._score.index_select(0, slot) >= 0.0
            self._scored -= int(had_score.sum())
            self._positive -= int((self._p.index_select(0, slot).gt(0.0) & had_score).sum())
        # What stands in for |δ| must be above 0, since its minus sign says that it is none.
        stand_in = max(float(self.default_priority), torch.finfo(self.dtype).tiny)
        self._score.index_fill_(0, slot, UNSCORED)
        self._p.index_fill_(0, slot, self.unscored_priority)
        self._td_error.index_fill_(0, slot, -stand_in)
        mass = self.unscored_priority * (stand_in if self.td_boost else 1.0) + self._eps
        self._sum_tree.update(slot, torch.full_like(slot, mass**self._alpha, dtype=self.dtype))
        if self._max_priority_within_buffer:
            self._restore_maximum(slot)

    def _slots(self, index: Any, storage: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Slots that a call names, their p, and which of its items they are (None: all)."""
        self._just_marked = None
        p = self._p
        flat = isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long
        if flat and index.device.type == "cpu" == p.device.type:
            try:  # the gather that is needed anyway is the cheapest range check there is
                return index, p.index_select(0, index), None
            except IndexError:  # a -1 to skip, or an index to name in an error
                pass
        slot, stored = flat_index(index, storage, self._max_capacity, p.device)
        return slot, p.index_select(0, slot), stored

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
            self._derive()
            if self._max_priority_within_buffer:
                self._restore_maximum(gone)

    def _claim(self, index: Tensor, p: Tensor) -> Tensor:
        """Resets slots that were never announced as written: the storage came with data."""
        if self._written < self._max_capacity:
            unknown = p == EMPTY
            if unknown.any():
                self._reset(index[unknown].unique())
                return self._p[index]
        return p

    def _restore_maximum(self, index: Tensor) -> None:
        """Finds the greatest |δ| anew if the slot that held it is in ``index``."""
        held_by = self._max_priority[1]
        if held_by is None or not bool((index == held_by).any()):
            return
        value, slot = self._td_error.max(0)
        self._max_priority = (float(value), int(slot)) if value >= 0.0 else None
