"""Sum trees: draw a slot with probability proportional to its leaf.

Two implementations behind one interface. :class:`CompiledSumTree` is TorchRL's C++ segment tree,
on CPU. :class:`RadixSumTree` is plain torch, on any device, and stands in where the extension does
not load: it is built for one minor version of torch, and pip lets another one in.

N slots, B items of one call.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EXTENSION_MISSING = (
    "TorchRL's compiled segment trees do not load ({error}): replay uses the torch radix tree, "
    "slower and as exact; install the torchrl that pairs with torch {torch}."
)


class SumTree(ABC):
    """N non-negative leaves and the sums over them, float32 or float64, on one device.

    It trusts its caller: indices are int64 in [0, N) and values finite and non-negative. A tree
    with a NaN in it draws garbage for ever.
    """

    capacity: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def __getitem__(self, index: Tensor | int) -> Any:
        """Leaves ``[B]`` at ``index`` ``[B]``; of an int one number."""

    @abstractmethod
    def update(self, index: Tensor, value: Tensor) -> None:
        """Sets the leaves ``index`` ``[B]`` to ``value`` ``[B]``; of duplicates the last wins."""

    @abstractmethod
    def total(self) -> float:
        """Sum over all leaves."""

    @abstractmethod
    def find(self, mass: Tensor) -> Tensor:
        """Slots that hold the given masses of the running sum over the leaves.

        Args:
            mass: ``[B]`` in (0, total]. What lies outside counts as the nearer end.

        Returns:
            int64 ``[B]``: per item the first slot whose prefix sum (its own leaf included) reaches
            the mass. Its leaf is never zero, whatever the rounding, as long as total > 0.
        """

    def mix(self, draw: Tensor, slots: int, lmbda: float, total: float) -> tuple[Tensor, Any]:
        """Draws by leaf with probability λ, else uniformly; one number serves both branches.

        Args:
            draw: Uniform numbers, float64 ``[B]`` in [0, 1). Below 1 − λ one is a slot, above it a
                mass of the running sum.
            slots: The first so many leaves are in use, the others are 0.
            lmbda: λ in (0, 1].
            total: Sum over all leaves, above 0.

        Returns:
            Slots, int64 ``[B]``, and a copy of their leaves, float64 ``[B]``: a tensor, or an array
            of numpy, whose operations on a batch cost 0.4 μs each, torch's 1 μs.
        """
        index = self.find((1.0 - draw).mul_(total / lmbda).to(self.dtype))
        if lmbda < 1.0:
            uniform = (draw * (slots / (1.0 - lmbda))).long()
            index = torch.where(draw < 1.0 - lmbda, uniform, index)
        index = index.clamp_max_(slots - 1)
        return index, self[index].double()

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

        self.capacity, self.dtype = capacity, dtype
        single = dtype == torch.float32
        self._numpy_dtype = np.float32 if single else np.float64
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
        self._tree.update(index.contiguous().numpy(), value.contiguous().numpy())

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

    def mix(self, draw: Tensor, slots: int, lmbda: float, total: float) -> tuple[Tensor, Any]:
        """Draws from the mixture; see :meth:`SumTree.mix`, whose lines these are, in numpy."""
        uniform = draw.numpy()
        mass = 1.0 - uniform
        mass *= total / lmbda
        np.minimum(mass, total, out=mass)
        index = self._tree.scan_lower_bound(mass.astype(self._numpy_dtype, copy=False))
        if lmbda < 1.0:
            slot = (uniform * (slots / (1.0 - lmbda))).astype(np.int64)
            index = np.where(uniform < 1.0 - lmbda, slot, index)
        np.minimum(index, slots - 1, out=index)
        leaf = self._tree.at(index)
        if np.count_nonzero(leaf) < leaf.size:  # found by rounding, or drawn uniformly under eps=0
            return super().mix(draw, slots, lmbda, total)
        return torch.from_numpy(index), leaf.astype(np.float64, copy=False)


class RadixSumTree(SumTree):
    """Sum tree of three levels in plain torch, on any device.

    Each level has R children a node, R = ceil(N^(1/3)): 100 for a million slots. A level is one
    gather and one cumulative sum over B rows of R, so nothing loops in Python.

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
        radix = max(2, round(capacity ** (1.0 / 3.0)))
        self._radix = radix if radix**3 >= capacity else radix + 1
        self._leaves, self._blocks, self._roots = (
            torch.zeros(self._radix**level, dtype=dtype, device=device) for level in (3, 2, 1)
        )

    def __getitem__(self, index: Tensor | int) -> Any:
        return self._leaves[index]

    def update(self, index: Tensor, value: Tensor) -> None:
        """Sets leaves; see :meth:`SumTree.update`."""
        index, value = last_of_duplicates(index, value)
        self._leaves[index] = value
        leaves, blocks = self._leaves.view(-1, self._radix), self._blocks.view(-1, self._radix)
        if index.numel() >= self._blocks.numel():  # fewer rows in all than rows touched
            self._blocks.copy_(leaves.sum(-1))
            self._roots.copy_(blocks.sum(-1))
            return
        block = index // self._radix
        self._blocks[block] = leaves[block].sum(-1)
        root = block // self._radix
        self._roots[root] = blocks[root].sum(-1)

    def total(self) -> float:
        """Sum over all leaves."""
        return float(self._roots.sum())

    def find(self, mass: Tensor) -> Tensor:
        """Slots that hold the masses; see :meth:`SumTree.find`."""
        root, mass = _descend(self._roots.expand(mass.shape[0], -1), mass)
        child, mass = _descend(self._blocks.view(-1, self._radix)[root], mass)
        block = root * self._radix + child
        child, _ = _descend(self._leaves.view(-1, self._radix)[block], mass)
        index: Tensor = block * self._radix + child
        return index


def _descend(rows: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """One level down: the child that holds the mass, and the mass left within it.

    Args:
        rows: Children's sums ``[B, R]``, non-negative, each row with one above zero.
        mass: ``[B]``.
    """
    prefix = rows.cumsum(-1)
    if rows.device.type != "cpu":
        # A parallel scan may round the prefix sum of a child without mass above its left
        # neighbour's. Such a child is no candidate.
        prefix = torch.where(rows > 0, prefix, -torch.inf).cummax(-1).values
    # What rounding leaves beyond the row's ends is its first or its last child with mass.
    mass = mass.clamp_min(torch.finfo(mass.dtype).tiny).minimum(prefix[:, -1]).unsqueeze(-1)
    child = torch.searchsorted(prefix, mass)
    mass = mass - (prefix.gather(-1, child) - rows.gather(-1, child))
    return child.squeeze(-1), mass.squeeze(-1)


def last_of_duplicates(index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps of each index the last value: a scatter with duplicates has no order on a GPU.

    Args:
        index: int64 ``[B]``.
        value: ``[B]``.

    Example:
        >>> last_of_duplicates(torch.tensor([4, 2, 4]), torch.tensor([1.0, 2.0, 3.0]))
        (tensor([2, 4]), tensor([2., 3.]))
    """
    ordered, origin = index.sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[last], value[origin[last]]


def make_sum_tree(capacity: int, dtype: torch.dtype, device: torch.device) -> SumTree:
    """The compiled tree on CPU where its extension loads, else the radix tree.

    Warns:
        RuntimeWarning: On CPU without the extension: one line with the remedy.
    """
    if device.type == "cpu":
        try:
            return CompiledSumTree(capacity, dtype)
        except ImportError as error:
            reason = str(error).splitlines()[0]
            message = _EXTENSION_MISSING.format(error=reason, torch=torch.__version__)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    return RadixSumTree(capacity, dtype, device)
