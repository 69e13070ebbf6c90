"""What a sampler accepts from outside: flat slot indices and one value for each.

Checked once, here, before anything is written; trees and arrays behind it trust their input.
B items of one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmrb_torchrl.checks import shown

_NO_STORAGE = (
    "storage should be provided to the sampler when the storage has more than one dimension: "
    "got an index of shape {shape}; pass storage=buffer.storage."
)


def flat_index(
    index: Any, storage: Any, capacity: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Slot indices as int64 ``[B]``, checked.

    Args:
        index: An int, a sequence or a tensor ``[B]`` of slots, where -1 means "not stored"; for a
            storage of several dimensions also a tuple of one tensor ``[B]`` per dimension, or a
            tensor ``[B, storage.ndim]``.
        storage: The storage that indices of several dimensions refer to; else unused.
        capacity: N, slots of the sampler.
        device: Where the result lives.

    Returns:
        Slots, int64 ``[K]``, those of -1 left out; and which of the B items they are, bool
        ``[B]``, or None where they are all.

    Raises:
        TypeError: The index is nothing that a tensor can be made of.
        IndexError: An index is below -1, not below ``capacity`` or no whole number.
        RuntimeError: The index has two dimensions and no storage is given.
    """
    flat = as_index(index, "index").to(device)
    if flat.ndim > 1:
        flat = _ravel(flat, storage)
    elif flat.ndim == 0:
        flat = flat.reshape(1)
    if flat.numel() == 0:
        return flat, None
    low, high = bounds(flat)
    if low < -1 or high >= capacity:
        raise IndexError(
            f"index {int(low if low < -1 else high)} is no slot of a sampler of capacity "
            f"{capacity}: pass the indices that extend or sample returned."
        )
    if low < 0:
        stored = flat >= 0
        return flat[stored], stored
    return flat, None


def as_tensor(values: Any, name: str, **kind: Any) -> Tensor:
    """``torch.as_tensor`` that names what it refuses.

    Raises:
        TypeError: ``values`` are no numbers.
    """
    try:
        return torch.as_tensor(values, **kind)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} is {shown(values)}: pass numbers, or a tensor of them.") from None


def as_index(index: Any, name: str) -> Tensor:
    """Slots or stamps as int64, of the shape that they come in; a tuple has an axis in each.

    Raises:
        TypeError: They are no numbers.
        IndexError: They are no whole numbers.
    """
    if isinstance(index, tuple):
        axes = [as_tensor(axis, name) for axis in index]
        index = torch.stack(axes, -1) if axes and _alike(axes) else index
    whole = as_tensor(index, name)
    if whole.dtype == torch.long:
        return whole
    bad = whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool
    if whole.numel() and bad:
        raise IndexError(f"{name} is {shown(whole)}: slots and stamps are whole numbers.")
    return whole.long()


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def _ravel(index: Tensor, storage: Any) -> Tensor:
    if storage is None:
        raise RuntimeError(_NO_STORAGE.format(shape=tuple(index.shape)))
    index = index.reshape(-1, index.shape[-1])
    shape = torch.tensor(tuple(storage.shape), device=index.device)
    if index.shape[-1] != len(shape):
        raise IndexError(
            f"an index of {index.shape[-1]} coordinates does not fit a storage of shape "
            f"{tuple(storage.shape)}."
        )
    outside = (index < 0) | (index >= shape)
    if bool(outside.any()):
        row = index[outside.any(-1)][0].tolist()
        raise IndexError(f"index {row} is no slot of a storage of shape {tuple(storage.shape)}.")
    stride = torch.ones_like(shape)
    stride[:-1] = shape[1:].flip(0).cumprod(0).flip(0)
    return (index * stride).sum(-1)


def bounds(values: Tensor) -> tuple[float, float]:
    """Least and greatest value; both NaN where one value is. One device synchronisation."""
    low, high = torch.aminmax(values)
    if values.device.type == "cpu":
        return low.item(), high.item()
    low, high = torch.stack((low, high)).tolist()
    return low, high


def checked_values(
    values: Any, index: Tensor, stored: Tensor | None, name: str, most: float, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """One finite value in [0, ``most``] per slot.

    Args:
        values: A number for all, or B numbers, also as ``[B, 1]``.
        index: int64 ``[K]``, at least one: the first result of :func:`flat_index`.
        stored: Its second result.
        name: What the values are, for the message.
        most: Greatest value accepted, inclusive, and finite.
        dtype: What the values are kept as, and rounded to before they are checked.

    Returns:
        The values ``[K]``, ``dtype`` on the index' device, and the greatest of them.

    Raises:
        RuntimeError: There are neither B values nor one.
        ValueError: A value is NaN, infinite, negative or above ``most``.
    """
    if isinstance(values, Tensor) and values.is_complex():
        raise TypeError(f"{name} is {shown(values)}: pass real numbers.")
    values = as_tensor(values, name, dtype=dtype, device=index.device)
    if values.requires_grad:
        values = values.detach()
    items = index.numel() if stored is None else stored.numel()
    if values.numel() == items:
        values = values.reshape(-1)
        values = values if stored is None else values[stored]
    elif values.numel() == 1:
        values = values.reshape(1).expand(index.shape)
    else:
        raise RuntimeError(
            f"{name} should be a number or an iterable of the same length as index: "
            f"got {name} of shape {tuple(values.shape)} for {items} indices."
        )
    low, high = bounds(values)
    if not (low >= 0.0 and high <= most):
        bad = "NaN" if math.isnan(low) else low if low < 0.0 else high
        raise ValueError(
            f"{name} {bad} is outside [0, {most:g}], NaN and infinity are too: nothing was "
            f"written; pass finite, non-negative values."
        )
    return values, high
