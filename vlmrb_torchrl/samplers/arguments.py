"""How slots and numbers that a caller passes are read."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import shown

_NO_SLOT = 2**62


def as_numbers(values: Any, name: str) -> Tensor:
    """``torch.as_tensor`` that names what it refuses.

    Raises:
        TypeError: ``values`` are no real numbers.
    """
    try:
        numbers = values if isinstance(values, Tensor) else torch.as_tensor(values)
        if not numbers.is_complex():
            return numbers
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"{name} is {shown(values)}: pass numbers, or a tensor of them.")


def as_index(index: Any, name: str) -> Tensor:
    """Slots or stamps as int64, of the shape that they come in; a tuple has an axis in each.

    Raises:
        TypeError: They are no numbers.
        IndexError: They are no whole numbers.
    """
    if isinstance(index, Tensor) and index.dtype == torch.long:
        return index
    if isinstance(index, tuple):
        axes = [as_numbers(axis, name) for axis in index]
        if len({axis.shape for axis in axes}) == 1:
            index = torch.stack(axes, -1)
    whole = as_numbers(index, name)
    if whole.numel() and (whole.is_floating_point() or whole.dtype == torch.bool):
        raise IndexError(f"{name} is {shown(whole)}: slots and stamps are whole numbers.")
    return whole.long()


def entry_of(storage: Any, key: NestedKey, index: Any) -> Tensor:
    """One entry of the rows ``index`` of a storage, ``[B, ...]``, without a copy of the others."""
    rows = storage._storage
    if isinstance(rows, TensorDictBase):
        entry: Tensor = rows.get(key)[index]
        return entry
    return torch.stack([row.get(key) for row in storage.get(index)])  # of a list


def sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; a copy to a GPU is not waited for."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # from other memory a copy is waited for
    return values.to(device, non_blocking=device.type != "cpu")


def raveled(index: Tensor, storage: Any) -> Tensor:
    """Flat slots ``[B]`` of coordinates ``[..., storage.ndim]``."""
    if storage is None:
        raise RuntimeError(
            "storage should be provided to the sampler when the storage has more than one "
            f"dimension: got an index of shape {tuple(index.shape)}; pass storage=buffer.storage."
        )
    if index.shape[-1] != len(storage.shape):
        raise IndexError(
            f"index is {shown(index)}: pass {len(storage.shape)} coordinates of a slot."
        )
    flat: Tensor = torch.zeros_like(index[..., 0])
    inside = torch.ones_like(flat, dtype=torch.bool)
    for axis, size in zip(index.unbind(-1), storage.shape, strict=True):
        inside &= (axis >= 0) & (axis < size)
        flat = flat * size + axis
    # What is no slot of the storage is none of the sampler either, but for -1, to be skipped.
    return torch.where(inside | (index == -1).all(-1), flat.clamp_min(-1), _NO_SLOT).reshape(-1)


def unraveled(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Coordinates of flat slots ``[B]``."""
    axes = []
    for size in reversed(shape[1:]):
        axes.append(index % size)
        index = index // size
    return (index, *reversed(axes))
