"""A replay buffer whose late writes never land on the wrong transition.

A score or a TD error is computed for a transition and arrives later; by then the ring may have
written another transition into its slot. Each slot therefore carries a generation, which counts
its writes, and a late write names the generation that it was computed for.

B: items of one call, N: slots of the storage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.data.replay_buffers.writers import TensorDictRoundRobinWriter

from vlmrb_torchrl.checks import is_key, require
from vlmrb_torchrl.keys import GENERATION, INDEX, TD_ERROR
from vlmrb_torchrl.samplers.indices import as_index, as_tensor


class VLMReplayBuffer(TensorDictReplayBuffer):
    """A ``TensorDictReplayBuffer`` with generation-stamped slots and guarded late writes.

    ``extend`` and ``add`` leave ``"index"`` and ``"index_generation"`` in the tensordict that they
    are given: where each transition went, and the stamp of that very write, taken under the lock
    that it was made under. Threads may extend in between; the pair stays exact::

        index = buffer.extend(data)
        ...  # any time later, in any thread
        live = buffer.write_scores(data["index"], data["index_generation"], score)

    A locked tensordict is left as it is; pass a shallow ``copy()`` to get the pair. Samples carry
    both keys too. All methods may be called from several threads, also with ``shared=True``;
    generations are per process. Loading an earlier state voids the stamps taken since: close what
    may still write with them first.

    Args:
        priority_key: Where |δ| lies in a batch passed to :meth:`update_tensordict_priority`.
        **kwargs: As of ``TensorDictReplayBuffer``. The default writer is a
            ``TensorDictRoundRobinWriter`` that tracks generations. Any sampler goes.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage
        >>> from vlmrb_torchrl.samplers import VLMPrioritizedSampler
        >>> sampler = VLMPrioritizedSampler(4)
        >>> buffer = VLMReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=2)
        >>> first = TensorDict({"x": torch.arange(3)}, [3])
        >>> index = buffer.extend(first)
        >>> index = buffer.extend(TensorDict({"x": torch.arange(3, 6)}, [3]))  # overwrites 0 and 1
        >>> buffer.write_scores(first["index"], first["index_generation"], torch.ones(3))
        tensor([False, False,  True])
    """

    _stored: TensorDictBase | None = None  # by the insertion that is going on

    def __init__(self, *, priority_key: str = TD_ERROR, **kwargs: Any) -> None:
        require(
            is_key(priority_key),
            "priority_key",
            priority_key,
            "name an entry of the batch, such as td_error",
        )
        if kwargs.get("writer") is None:
            kwargs["writer"] = partial(
                _StampingWriter, compilable=kwargs.get("compilable"), track_generations=True
            )
        super().__init__(priority_key=priority_key, **kwargs)

    # ---------------------------------------------------------------- inserting

    def extend(self, tensordicts: TensorDictBase, **kwargs: Any) -> Tensor:
        """Writes a batch of transitions, and their slots and stamps into ``tensordicts``.

        Args:
            tensordicts: ``[B, ...]``; gets ``"index"`` and ``"index_generation"``, int64 ``[B]``.
            **kwargs: As of ``TensorDictReplayBuffer.extend``.

        Returns:
            Slots, int64 ``[B]``, or ``[B, storage.ndim]``.
        """
        with self._replay_lock:
            index: Tensor = super().extend(_unstamped(tensordicts), **kwargs)
            # Under the lock that the write was made under: no other thread has written since.
            if self._may_stamp(tensordicts):
                batch, dim = list(tensordicts.shape), self.dim_extend
                batch[0], batch[dim] = batch[dim], batch[0]  # the buffer extends along dim 0
                if stamp := self._stamp(index, batch):
                    stamp = stamp if dim == 0 else [part.transpose(0, dim) for part in stamp]
                    _set_stamp(tensordicts, *stamp)
        return index

    def add(self, data: TensorDictBase) -> Any:
        """Writes one transition, and its slot and stamp into ``data``; see :meth:`extend`."""
        with self._replay_lock:
            index = super().add(_unstamped(data))
            if self._may_stamp(data) and index is not None:
                stamp = self._stamp(torch.as_tensor(index).reshape(1), [1, *data.shape])
                if stamp:
                    _set_stamp(data, *(part.squeeze(0) for part in stamp))
        return index

    def insert(self, data: TensorDictBase) -> TensorDictBase | None:
        """Writes a batch of any shape, a transition a slot, and says what was written.

        The transforms see the shape that ``data`` has, so that ``MultiStepTransform`` looks along
        each row. For a storage of one dimension.

        Args:
            data: Transitions, ``[..., T]``; left as they are.

        Returns:
            What the transforms made of them, ``[..., T]``, with ``"index"`` and
            ``"index_generation"``, int64 ``[..., T]``; None if they hold everything back.
        """
        with self._replay_lock:
            data = _unstamped(data)
            stored = self._transform.inv(data) if len(self._transform) else data.copy()
            if stored is None or not stored.numel():
                return None
            rows = stored.reshape(-1)
            index = self._extend(rows)
            if (priority := rows.get(self.priority_key, None)) is not None:
                self.update_priority(index, priority)
            if stamp := self._stamp(index, [len(index)]):
                _set_stamp(stored, *(part.reshape(stored.shape) for part in stamp))
        return stored

    def _set_index_in_td(self, tensordict: TensorDictBase, index: Any) -> None:
        super()._set_index_in_td(tensordict, index)
        self._stored = tensordict  # TorchRL says here alone what the transforms made of the data

    def _may_stamp(self, data: Any) -> bool:
        stored, self._stored = self._stored, None
        if not isinstance(data, TensorDictBase) or data.is_locked:
            return False
        own = not len(self._transform) or _same_rows(data, stored)
        return own and bool(self._writer.tracks_generations)

    def _stamp(self, index: Tensor, batch: list[int]) -> Sequence[Tensor] | None:
        """Slots and generations of a batch just written, laid out as ``batch``, its shape."""
        dims = self._storage.ndim
        slots = batch[:dims]
        if index.shape[0] != math.prod(slots):
            return None  # a transform changed the batch: its rows are not the caller's
        generation: Tensor = self._writer.generations_of(index)
        rows: int = self._storage._max_size_along_dim0()
        if slots[0] > rows:  # a batch longer than the ring overwrote its own start
            generation.reshape(slots)[:-rows] = -1
        if len(batch) == 1:
            return index, generation
        if dims > 1:
            return index.reshape(*slots, dims), generation.reshape(slots)
        # A storage of one dimension keeps a whole trajectory in a slot: each step names the slot.
        return _expand(index, batch), _expand(generation, batch)

    # ---------------------------------------------------------------- late writes

    def generations_of(self, index: Any) -> Tensor:
        """How often each slot was rewritten by now, int64 ``[B]``; -1 where it never was written.

        The stamp of one's own insertion is in the tensordict passed to :meth:`extend`: another
        thread may have written between that call and this one.
        """
        with self._replay_lock, self._write_lock:
            return self._generations(index)

    def write_scores(self, index: Any, generation: Any, score: Any) -> Tensor:
        """Gives the judge's scores to the transitions that they were computed for.

        Args:
            index: Slots, int64 ``[B]`` (or ``[B, storage.ndim]``), of the insertion or a sample.
            generation: The stamps that came with them, int64 ``[B]``.
            score: ``[B]`` or ``[B, 1]`` in [0, 1].

        Returns:
            bool ``[B]``: which slots still held their transition and got the score.

        Raises:
            TypeError: The sampler keeps no scores, the writer no generations, or an argument is
                nothing that a tensor can be made of.
            ValueError: A score to be written is NaN or outside [0, 1]; nothing was written.
            IndexError: An index is no slot; nothing was written.
        """
        if not hasattr(self.sampler, "update_score"):
            raise TypeError(
                f"{type(self.sampler).__name__} keeps no scores: build the buffer with a "
                "VLMPrioritizedSampler, or score nothing."
            )
        return self._write_live(self.sampler.update_score, index, generation, score)

    def write_td_errors(self, index: Any, generation: Any, td_error: Any) -> Tensor:
        """Gives |δ| to the transitions that it was computed for; see :meth:`write_scores`.

        Args:
            index: Slots, int64 ``[B]`` (or ``[B, storage.ndim]``).
            generation: The stamps that came with them, int64 ``[B]``.
            td_error: |δ|, ``[B]`` or ``[B, 1]``, in units of return.

        Returns:
            bool ``[B]``: which slots still held their transition and got the TD error.

        Raises:
            TypeError: The sampler is not prioritized, the writer keeps no generations, or an
                argument is nothing that a tensor can be made of.
            ValueError: A TD error to be written is NaN, infinite or negative; nothing was written.
            IndexError: An index is no slot; nothing was written.
        """
        if not isinstance(self.sampler, PrioritizedSampler):
            raise TypeError(
                f"{type(self.sampler).__name__} keeps no priorities: build the buffer with a "
                "prioritized sampler, or write no TD errors."
            )
        return self._write_live(self.sampler.update_priority, index, generation, td_error)

    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """Writes |δ| of a sampled batch back, leaving out what was overwritten since.

        Args:
            data: ``[B]`` with ``"index"``, ``"index_generation"`` and |δ| at ``priority_key``,
                ``[B]`` or ``[B, 1]``. Without a stamp, or with windows drawn by a sample unit,
                nothing is left out, as in TorchRL.

        Raises:
            KeyError: The sampler draws by |δ| and the batch has none.
        """
        sampler = self.sampler
        if not isinstance(sampler, PrioritizedSampler):
            return
        generation = data.get(GENERATION, None)
        td_error = data.get(self.priority_key, None)
        if td_error is None and hasattr(sampler, "uses_td_error"):
            # TorchRL would write the running maximum, as if these slots had been visited.
            if generation is not None and sampler.uses_td_error:
                raise KeyError(
                    f"the batch has no {self.priority_key!r}, which the sampler draws by: let the "
                    "loss write it, or pass priority_key."
                )
            return
        guarded = generation is not None and self.writer.tracks_generations and data.ndim > 0
        if td_error is None or not guarded or self._sample_unit is not None:
            super().update_tensordict_priority(data)
            return
        index = data.get(INDEX)
        if td_error.numel() != data.shape[0]:
            td_error = self._get_priority_vector(data)  # one of a stored trajectory
            generation = generation.reshape(td_error.shape[0], -1)[:, 0]
            if self._storage.ndim == 1:
                index = index.reshape(td_error.shape[0], -1)[:, 0]
        self.write_td_errors(index, generation, td_error)

    def _write_live(self, write: Any, index: Any, generation: Any, value: Any) -> Tensor:
        if not self.writer.tracks_generations:
            raise TypeError(
                f"{type(self.writer).__name__} keeps no generations: build the buffer with "
                "writer=TensorDictRoundRobinWriter(track_generations=True), or with none."
            )
        index, generation = as_index(index, "index"), as_index(generation, "generation")
        value = as_tensor(value, "the values").detach()
        items = index.shape[0] if index.ndim else -1
        if generation.shape != (items,) or value.numel() != items:
            raise ValueError(
                f"index of shape {tuple(index.shape)} came with stamps of shape "
                f"{tuple(generation.shape)} and values of shape {tuple(value.shape)}: pass one of "
                "each per transition."
            )
        value = value.reshape(-1)
        # In this order, as everywhere in TorchRL. The sampler is called itself: with shared=True
        # the write lock is not re-entrant, and buffer.update_priority would wait for itself.
        with self._replay_lock, self._write_lock:
            current = self._generations(index)
            live: Tensor = (generation.to(current.device) == current) & (current >= 0)
            if bool(live.all()):
                write(index, value, storage=self._storage)
                return live
            self._check_slots(index)
            if bool(live.any()):
                write(index[live], value[live.to(value.device)], storage=self._storage)
        return live

    def _check_slots(self, index: Tensor) -> None:
        """Refuses what is no slot, and so was never one's own; -1 is what was not stored."""
        slots = self._storage.max_size
        outside = index[(index < -1) | (index >= slots)]
        if len(outside):
            raise IndexError(
                f"index {int(outside[0])} is no slot of a buffer of {slots}: pass the indices that "
                "extend or sample returned."
            )

    def _generations(self, index: Any) -> Tensor:
        stamps: Tensor = self._writer.generations_of(index)
        return stamps


class _StampingWriter(TensorDictRoundRobinWriter):
    """TorchRL's writer, which looks stamps of 64 slots up in 1 μs instead of 11."""

    def generations_of(self, index: Any) -> Tensor:
        """See ``RoundRobinWriter.generations_of``."""
        stamps: Tensor | None = self._generation
        flat = isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long
        if flat and stamps is not None and index.device.type == "cpu" == stamps.device.type:
            try:
                return stamps.index_select(0, index)
            except IndexError:  # a slot out of range: TorchRL's answer to it is -1
                pass
        generations: Tensor = super().generations_of(index)
        return generations


def _unstamped(data: Any) -> Any:
    """The same data without the stamp of an earlier write, which is no part of a transition."""
    if isinstance(data, TensorDictBase) and GENERATION in data:
        return data.exclude(GENERATION)
    return data


def _same_rows(data: TensorDictBase, stored: TensorDictBase | None) -> bool:
    """Whether a transform made ``stored`` of ``data`` and left the rows, and so an entry, alone.

    Their number does not tell: ``MultiStepTransform`` stores as many, but earlier ones.
    """
    entries = data.items(include_nested=True, leaves_only=True)
    return stored is not None and any(stored.get(key, None) is each for key, each in entries)


def _expand(values: Tensor, batch: list[int]) -> Tensor:
    """Values ``[B]`` repeated over the dimensions of ``batch`` after the first."""
    return values.reshape(-1, *[1] * (len(batch) - 1)).expand(batch)


def _set_stamp(data: TensorDictBase, index: Tensor, generation: Tensor) -> None:
    if data.device is not None:
        index, generation = index.to(data.device), generation.to(data.device)
    data.set(INDEX, index).set(GENERATION, generation)
