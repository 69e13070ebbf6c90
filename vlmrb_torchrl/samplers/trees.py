"""Sum trees: draw a slot with probability proportional to its leaf.

Two implementations behind one interface. :class:`CompiledSumTree` is TorchRL's C++ segment tree,
on CPU. :class:`RadixSumTree` is plain torch, on any device, and stands in where the extension does
not load: it is built for one minor version of torch, and pip lets another one in.

N slots, B items of one call.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrb_torchrl.checks import shown

_USUAL_BATCH = 64  # items, of which a radix tree's shape makes the most
_EXTENSION_MISSING = (
    "TorchRL's compiled segment trees do not load with torch {torch}: replay uses the torch radix "
    "tree, slower and as exact; torchrl 0.14 was built for torch 2.14 ({error})."
)


class SumTree(ABC):
    """N non-negative leaves and the sums over them, float32 or float64, on one device.

    It trusts its caller: indices are int64 in [0, N) and values finite and non-negative. A tree
    with a NaN in it draws garbage for ever.
    """

    capacity: int
    nowhere: int
    """An index behind the slots; off the CPU what is written there has no effect."""
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def __getitem__(self, index: Tensor | int) -> Any:
        """Leaves ``[B]`` at ``index`` ``[B]``; of an int one number."""

    @abstractmethod
    def update(self, index: Tensor, value: Tensor) -> None:
        """Sets the leaves ``index`` ``[B]`` to ``value`` ``[B]``, which is one for duplicates."""

    @abstractmethod
    def total(self) -> Any:
        """Sum over all leaves, a number or a 0-dimensional tensor."""

    @abstractmethod
    def find(self, mass: Tensor) -> Tensor:
        """Slots that hold the given masses of the running sum over the leaves.

        Args:
            mass: ``[B]`` in (0, total]. What lies outside counts as the nearer end, a NaN as total.

        Returns:
            int64 ``[B]``: per item the first slot whose prefix sum (its own leaf included) reaches
            the mass. Its leaf is never zero, whatever the rounding, as long as total > 0.
        """

    def leaves(self) -> Tensor:
        """All leaves, a copy ``[N]``."""
        leaves: Tensor = self[torch.arange(self.capacity, device=self.device)]
        return leaves


class CompiledSumTree(SumTree):
    """TorchRL's C++ segment tree on CPU.

    Raises:
        ImportError: The extension does not load with this torch.

    Example:
        >>> tree = CompiledSumTree(3, torch.float64)
        >>> tree.update(torch.tensor([0, 2]), torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> tree.find(torch.tensor([1.0, 1.5, 4.0], dtype=torch.float64)).tolist()
        [0, 2, 2]
    """

    device = torch.device("cpu")

    def __init__(self, capacity: int, dtype: torch.dtype = torch.float64) -> None:
        from torchrl._torchrl import SumSegmentTreeFp32, SumSegmentTreeFp64

        self.capacity, self.nowhere, self.dtype = capacity, capacity, dtype
        single = dtype == torch.float32
        self.numpy_dtype = np.float32 if single else np.float64
        self._tree: Any = (SumSegmentTreeFp32 if single else SumSegmentTreeFp64)(capacity)

    # The numpy overloads cost a quarter of the tensor overloads (0.6 against 4.2 μs a gather of
    # 32): pybind first tries a tensor as a scalar, whose failure is a Python exception. They read
    # memory flat, so arrays must be contiguous.
    def __getitem__(self, index: Tensor | int) -> Any:
        if isinstance(index, Tensor):
            return torch.from_numpy(self._tree.at(index.contiguous().numpy()))
        return self._tree.at(index)

    def update(self, index: Tensor, value: Tensor) -> None:
        """Sets leaves; see :meth:`SumTree.update`."""
        self.set(index.contiguous().numpy(), value.contiguous().numpy())

    def set(self, index: np.ndarray, value: np.ndarray) -> None:
        """The same of contiguous arrays."""
        self._tree.update(index, value)

    def total(self) -> float:
        """Sum over all leaves."""
        return float(self._tree.query(0, self.capacity))

    def find(self, mass: Tensor) -> Tensor:
        """Slots that hold the masses; see :meth:`SumTree.find`."""
        tiny, ulp = torch.finfo(self.dtype).tiny, torch.finfo(self.dtype).eps
        mass = mass.clamp(tiny, self.total())  # beyond the root the C++ scan returns N: no slot
        while ulp < 1.0:
            index = torch.from_numpy(self._tree.scan_lower_bound(mass.numpy()))
            zero = self[index] == 0
            if not zero.any():
                return index
            # Rounding has pushed the descent past the last leaf that holds mass; the error is a few
            # ulp of the mass, so taking twice as many each round ends after a round or two.
            mass = torch.where(zero, mass * (1.0 - ulp), mass)
            ulp *= 2.0
        raise RuntimeError("find in a sum tree whose total is 0: no slot has mass")

    def mix(
        self, draw: np.ndarray, slots: int, lmbda: float, total: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws by leaf with probability λ, else uniformly; one number serves both branches.

        In numpy, whose operations on a batch cost 0.4 μs each, torch's 1 μs.

        Args:
            draw: Uniform numbers, float64 ``[B]`` in [0, 1). Below 1 − λ one is a slot, above it a
                mass of the running sum.
            slots: The first so many leaves are in use, the others are 0.
            lmbda: λ in (0, 1].
            total: Sum over all leaves, above 0.

        Returns:
            Slots, int64 ``[B]``, and a copy of their leaves, float64 ``[B]``.
        """
        mass = 1.0 - draw
        mass *= total / lmbda
        # N for what is beyond the root: the draws below 1 − λ, and one that rounding has put there.
        index = self._tree.scan_lower_bound(mass.astype(self.numpy_dtype, copy=False))
        if lmbda < 1.0:
            slot = (draw * (slots / (1.0 - lmbda))).astype(np.int64)
            index = np.where(draw < 1.0 - lmbda, slot, index)
        np.minimum(index, slots - 1, out=index)
        leaf = self._tree.at(index)
        if np.count_nonzero(leaf) < leaf.size:  # found by rounding, or drawn uniformly under eps=0
            by_leaf = draw >= 1.0 - lmbda
            index[by_leaf] = self.find(torch.from_numpy(mass[by_leaf]).to(self.dtype)).numpy()
            leaf = self._tree.at(index)
        return index, leaf.astype(np.float64, copy=False)


class RadixSumTree(SumTree):
    """Sum tree of two levels in plain torch, on any device, which is never waited for.

    Leaves lie in rows of C; kept beside them are the running sums along each row, and those over
    the rows. A batch of B reads B rows and scans N / C sums, so C is about √(N / B). Every shape is
    that of the call: a CUDA graph can hold all of it but ``leaves``.

    Example:
        >>> tree = RadixSumTree(3, torch.float64)
        >>> tree.update(torch.tensor([0, 2]), torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> tree.find(torch.tensor([1.0, 1.5, 4.0], dtype=torch.float64)).tolist()
        [0, 2, 2]
    """

    def __init__(
        self,
        capacity: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device = CompiledSumTree.device,
    ) -> None:
        self.capacity, self.dtype, self.device = capacity, dtype, device
        self._columns = max(2, math.isqrt(capacity // _USUAL_BATCH))
        rows = -(-capacity // self._columns)
        self.nowhere = rows * self._columns  # the first leaf of a row that is not summed
        self._leaves = torch.zeros(rows + 1, self._columns, dtype=dtype, device=device)
        self._in_row = self._running(self._leaves)
        self._over_rows = self._running(self._leaves[:-1].sum(-1))

    def __getitem__(self, index: Tensor | int) -> Any:
        return self._leaves.view(-1)[index]

    def update(self, index: Tensor, value: Tensor) -> None:
        """Sets leaves; see :meth:`SumTree.update`."""
        self._leaves.view(-1)[index] = value
        if index.numel() >= len(self._leaves):  # fewer rows in all than rows touched
            self._in_row.copy_(self._running(self._leaves))
        else:
            row = index // self._columns
            self._in_row[row] = self._running(self._leaves[row])
        self._over_rows.copy_(self._running(self._in_row[:-1, -1].clamp_min(0.0)))

    def total(self) -> Tensor:
        """Sum over all leaves."""
        return self._over_rows[-1].clamp_min(0.0)

    def find(self, mass: Tensor) -> Tensor:
        """Slots that hold the masses; see :meth:`SumTree.find`."""
        row = torch.searchsorted(self._over_rows, mass.fmin(self._over_rows[-1]))
        in_row = self._in_row[row]
        rest = mass - (self._over_rows[row] - in_row[:, -1])
        # What rounding leaves beyond the row's end is its last leaf with mass.
        column = torch.searchsorted(in_row, rest.fmin(in_row[:, -1]).unsqueeze(-1)).squeeze(-1)
        return column.add(row, alpha=self._columns)

    def _running(self, mass: Tensor) -> Tensor:
        """Running sums along the last dimension, −∞ before the first mass: nothing finds it."""
        sums = mass.cumsum(-1)
        if self.device.type == "cpu":  # one after the other: they never fall
            return sums.masked_fill_(sums == 0.0, -torch.inf)
        # A parallel scan may round the sum at a leaf without mass above its left neighbour's.
        # Such a leaf is no candidate.
        return sums.masked_fill_(mass <= 0.0, -torch.inf).cummax(-1).values


def last_of_duplicates(index: Tensor, slots: int) -> Tensor:
    """For each item the last item of the same slot, int64 ``[B]``.

    A scatter with duplicates has no order on a GPU. Without a wait for it.

    Args:
        index: int64 ``[B]`` in [0, ``slots``).
        slots: Number of slots.

    Example:
        >>> last_of_duplicates(torch.tensor([4, 2, 4]), 5)
        tensor([2, 1, 2])
    """
    item = torch.arange(len(index), device=index.device)
    last = item.new_empty(slots)
    return last.scatter_reduce_(0, index, item, "amax", include_self=False)[index]


def make_sum_tree(capacity: int, dtype: torch.dtype, device: torch.device) -> SumTree:
    """The compiled tree on CPU where its extension loads, else the radix tree.

    Warns:
        RuntimeWarning: On CPU without the extension: one line with the remedy.
    """
    if device.type == "cpu":
        try:
            return CompiledSumTree(capacity, dtype)
        except ImportError as error:
            reason = shown(str(error).rpartition("/")[-1])  # a symbol of 300 characters
            message = _EXTENSION_MISSING.format(error=reason, torch=torch.__version__)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    return RadixSumTree(capacity, dtype, device)
