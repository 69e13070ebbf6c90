"""What clips need of one insertion batch, read once and split by trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor

from vlmrb_torchrl.checks import shown
from vlmrb_torchrl.keys import EVENTS, RENDER_STATE

_TRAJECTORY = ("collector", "traj_ids")
_MASK = ("collector", "mask")
_DONE = ("next", "done")
_OUTCOME = ("next", RENDER_STATE)
_NEXT_EVENTS = ("next", EVENTS)
_CPU = torch.device("cpu")
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(slots=True, eq=False)
class Span:
    """Consecutive transitions, as many as ``slot`` is long (T), on the CPU.

    Attributes:
        slot: Where they lie in the buffer, int64 ``[T]``.
        generation: The slots' stamps when they were inserted, int64 ``[T]``.
        outcome: Render states that they lead to, ``[T, *S]``; None if the data has none.
        events: What the simulator saw in each, bool ``[T, E]``; None if the data has none.
    """

    slot: NDArray[np.int64]
    generation: NDArray[np.int64]
    outcome: Any  # Tensor or TensorDict
    events: NDArray[np.bool_] | None

    def cut(self, start: int, stop: int) -> Span:
        """A view of the transitions from ``start`` to before ``stop``."""
        return Span(
            self.slot[start:stop],
            self.generation[start:stop],
            None if self.outcome is None else self.outcome[start:stop],
            None if self.events is None else self.events[start:stop],
        )

    @property
    def kind(self) -> tuple[object, ...]:
        """What spans must share to be joined: keys, dtypes and shapes of a transition."""
        states = self.outcome.items(True, True) if is_tensor_collection(self.outcome) else ()
        whole = () if self.outcome is None or states else (("", self.outcome),)
        events = None if self.events is None else self.events.shape[1:]
        return events, *((key, each.dtype, each.shape[1:]) for key, each in (*whole, *states))

    def state_dict(self) -> dict[str, Any]:
        """The four fields, as tensors."""
        return {
            "slot": torch.from_numpy(self.slot.copy()),
            "generation": torch.from_numpy(self.generation.copy()),
            "outcome": self.outcome,
            "events": None if self.events is None else torch.from_numpy(self.events.copy()),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Span:
        """The inverse of `state_dict`."""
        events = state["events"]
        return cls(
            state["slot"].numpy(),
            state["generation"].numpy(),
            state["outcome"],
            None if events is None else events.numpy(),
        )


def join(spans: list[Span]) -> Span:
    """Spans one after the other, as one."""
    if len(spans) == 1:
        return spans[0]
    events = [span.events for span in spans if span.events is not None]
    return Span(
        np.concatenate([span.slot for span in spans]),
        np.concatenate([span.generation for span in spans]),
        None if spans[0].outcome is None else torch.cat([span.outcome for span in spans]),
        np.concatenate(events) if events else None,
    )


@dataclass(slots=True, eq=False)
class Segment:
    """A stretch of an insertion that belongs to one trajectory, which may end with it."""

    trajectory: int
    start: int
    stop: int
    ended: bool


@dataclass(slots=True, eq=False)
class Insertion:
    """One insertion batch of T transitions: all of them, and the stretches of trajectories."""

    span: Span
    acted_in: Any  # render states that the actions were taken in, [T, *S]; None where not stored
    segments: list[Segment]

    def continues(self, span: Span, start: int) -> bool:
        """Whether the transition at ``start`` was taken where ``span`` led to, if that is known."""
        if self.acted_in is None or span.outcome is None:
            return True
        return bool((span.outcome[-1] == self.acted_in[start]).all())


def check_inserted(data: Any, index: Any, slots: int) -> None:
    """Refuse what was not inserted into a buffer of ``slots``.

    Raises:
        TypeError: ``data`` is no TensorDict, or ``index`` no tensor of whole numbers.
        ValueError: There are no transitions, or ``index`` names what is no slot.
    """
    if not isinstance(data, TensorDictBase):
        raise TypeError(f"data is {shown(data)}; pass the TensorDict that was inserted.")
    if not data.numel():
        raise ValueError(f"data is of shape {list(data.shape)}; pass one transition or more.")
    if not isinstance(index, Tensor) or index.dtype not in _WHOLE:
        raise TypeError(f"index is {shown(index)}; pass the slots that extend returned.")
    outside = index[(index < -1) | (index >= slots)]
    if len(outside):
        raise ValueError(
            f"index is {int(outside[0])}, no slot of a buffer of {slots}; pass the slots that "
            "extend returned."
        )


def read_insertion(
    data: TensorDictBase, index: Tensor, generation: Tensor, needs_frames: bool
) -> Insertion:
    """Copy what clips need to the CPU and split it; arguments as in `ClipCutter.cut`."""
    T = data.numel()
    if index.numel() != T or generation.numel() != T:
        raise ValueError(
            f"data holds {T} transitions, index {index.numel()} slots and generation "
            f"{generation.numel()}; insert data.reshape(-1) and pass the index it returned."
        )
    done = data.get(_DONE, None)
    if done is None:
        raise KeyError(f"data has no {_DONE}: clips end where trajectories end, so it is needed.")
    outcome = _flat(data.get(_OUTCOME, None), data.ndim, copy=True)
    if outcome is None and needs_frames:
        raise KeyError(
            f"data has no {_OUTCOME}, which the frames are drawn from: let the environment write "
            '"render_state", or use a scorer that reads only events.'
        )
    events = _flat(data.get(_NEXT_EVENTS, None), data.ndim, copy=True)
    span = Span(
        index.detach().reshape(-1).to("cpu", torch.int64, copy=True).numpy(),
        generation.detach().reshape(-1).to("cpu", torch.int64, copy=True).numpy(),
        outcome,
        None if events is None else events.numpy(),
    )
    acted_in = None if outcome is None else _flat(data.get(RENDER_STATE, None), data.ndim)
    return Insertion(span, acted_in, _segments(data, done.reshape(T, -1).any(-1).cpu().numpy()))


def _flat(value: Any, batch_dims: int, copy: bool = False) -> Any:
    """``[*B, *S]`` as ``[T, *S]`` on the CPU, Tensor or TensorDict.

    Copied where it is kept: a collector may write its next batch into the same memory.
    """
    if value is None:
        return None
    if is_tensor_collection(value):
        value = value.reshape(-1)
    else:
        value = value.detach().reshape(-1, *value.shape[batch_dims:])
    return value.clone() if copy and value.device in (None, _CPU) else value.to(_CPU)


def _segments(data: TensorDictBase, done: NDArray[np.bool_]) -> list[Segment]:
    T = len(done)
    rows = data.ndim > 1
    row_length = data.shape[-1] if rows else T
    ids, valid = data.get(_TRAJECTORY, None), data.get(_MASK, None)
    keys = np.arange(T) // row_length if ids is None else ids.reshape(-1).cpu().numpy()
    if valid is not None:
        keys = np.where(valid.reshape(-1).cpu().numpy(), keys, -1)
    cuts = (keys[1:] != keys[:-1]) | done[:-1]
    if rows:
        cuts[row_length - 1 :: row_length] = True
    starts = [0, *(np.flatnonzero(cuts) + 1).tolist()]
    stops = [*starts[1:], T]
    return [
        # In a row of one environment another trajectory follows only where this one ended.
        Segment(key, start, stop, bool(done[stop - 1]) or (rows and stop % row_length != 0))
        for start, stop, key in zip(starts, stops, keys[starts].tolist(), strict=True)
        if key >= 0  # collectors mark padding with -1
    ]
