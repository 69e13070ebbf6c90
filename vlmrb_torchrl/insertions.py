"""What clips need of one insertion batch, read once and split by trajectory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor

from vlmrb_torchrl.checks import shown
from vlmrb_torchrl.keys import EVENTS, RENDER_STATE

_TRAJECTORY = ("collector", "traj_ids")
_MASK = ("collector", "mask")
_DONE = ("next", "done")
_OUTCOME = ("next", RENDER_STATE)
_NEXT_EVENTS = ("next", EVENTS)
_STEPS = "steps_to_next_obs"
"""Where TorchRL's n-step transforms write how many steps a transition spans."""
_CPU = torch.device("cpu")
Kind: TypeAlias = tuple[object, ...]
"""Keys, dtypes and shapes of what clips hold of a transition."""
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(slots=True, eq=False)
class Span:
    """Consecutive transitions, as many as ``slot`` is long (T), on the CPU.

    Attributes:
        slot: Where they lie in the buffer, int64 ``[T]``.
        generation: The slots' stamps when they were inserted, int64 ``[T]``.
        outcome: Render states that they lead to, ``[T, *S]``; None if the data has none.
        events: What the simulator saw in each, bool ``[T, E]``; None if the data has none.
        steps: Of the environment that each spans, int64 ``[T]``: 1, except of n-step transitions.
            Transition i leads to where transition i + steps[i] begins.
    """

    slot: NDArray[np.int64]
    generation: NDArray[np.int64]
    outcome: Any  # Tensor or TensorDict
    events: NDArray[np.bool_] | None
    steps: NDArray[np.int64]

    def cut(self, start: int, stop: int) -> Span:
        """A view of the transitions from ``start`` to before ``stop``."""
        return Span(
            self.slot[start:stop],
            self.generation[start:stop],
            None if self.outcome is None else self.outcome[start:stop],
            None if self.events is None else self.events[start:stop],
            self.steps[start:stop],
        )

    @property
    def kind(self) -> Kind:
        """What spans must share to be joined."""
        return _kind(self.outcome, self.events)

    def state_dict(self) -> dict[str, Any]:
        """The fields, as tensors."""
        return {
            "slot": torch.from_numpy(self.slot.copy()),
            "generation": torch.from_numpy(self.generation.copy()),
            "outcome": self.outcome,
            "events": None if self.events is None else torch.from_numpy(self.events.copy()),
            "steps": torch.from_numpy(self.steps.copy()),
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
            state["steps"].numpy(),
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
        np.concatenate([span.steps for span in spans]),
    )


@dataclass(slots=True, eq=False)
class Segment:
    """A stretch of an insertion that belongs to one trajectory, which may end with it.

    Attributes:
        acted_in: Render state that its first action was taken in, ``[1, *S]``; None if the data
            has none.
    """

    trajectory: int
    start: int
    stop: int
    ended: bool
    acted_in: Any  # Tensor or TensorDict

    def follows(self, span: Span) -> bool:
        """Whether its first action was taken where ``span`` led to, if that is known."""
        length = len(span.slot)
        there = np.flatnonzero(np.arange(length) + span.steps == length)
        if self.acted_in is None or not len(there):
            return True
        return not _differ(span.outcome[there[-1:]], self.acted_in).any()


@dataclass(slots=True, eq=False)
class Insertion:
    """One insertion batch of T transitions: all of them, and the stretches of trajectories."""

    span: Span
    segments: list[Segment]


def check_transitions(data: Any, needs: Collection[str]) -> Kind:
    """Refuse what clips cannot be cut from; return what kind it is.

    Args:
        data: Transitions, as of `ClipCutter.cut`.
        needs: What the scorer wants of them, ``"render_state"`` or ``"events"``.

    Raises:
        TypeError: ``data`` is no TensorDict.
        ValueError: There are no transitions.
        KeyError: A key is missing, or nothing tells which transition follows on which.
    """
    if not isinstance(data, TensorDictBase):
        raise TypeError(f"data is {shown(data)}; pass the TensorDict that was inserted.")
    if 0 in data.shape:
        raise ValueError(f"data is of shape {list(data.shape)}; pass one transition or more.")
    keys = data.keys(include_nested=True)
    if _DONE not in keys:
        raise KeyError(f"data has no {_DONE}: clips end where trajectories end, so it is needed.")
    for need in needs:
        if ("next", need) not in keys:
            raise KeyError(
                f"data has no {('next', need)}, which the scorer wants: let the environment write "
                f'"{need}" and the buffer keep it, or use a scorer that does without.'
            )
    outcome = _flat(data, _OUTCOME)
    if data.ndim < 2 and _TRAJECTORY not in keys and _acted_in(data, outcome) is None:
        raise KeyError(
            f"data of shape {list(data.shape)} has neither {_TRAJECTORY} nor render states, so "
            "nothing tells one environment's transitions from another's: pass it as [N, T], one "
            "environment a row, or let the collector track trajectory ids."
        )
    return _kind(outcome, _flat(data, _NEXT_EVENTS))


def _kind(outcome: Any, events: Any) -> Kind:
    states = outcome.items(True, True) if is_tensor_collection(outcome) else ()
    whole = () if outcome is None or states else (("", outcome),)
    shape = None if events is None else events.shape[1:]
    return shape, *((key, each.dtype, each.shape[1:]) for key, each in (*whole, *states))


def check_index(index: Any, slots: int) -> None:
    """Refuse what are no slots of a buffer of ``slots``.

    Raises:
        TypeError: ``index`` is no tensor of whole numbers.
        ValueError: It names what is no slot.
    """
    if not isinstance(index, Tensor) or index.dtype not in _WHOLE:
        raise TypeError(f"index is {shown(index)}; pass the slots that extend returned.")
    outside = index[(index < -1) | (index >= slots)]
    if len(outside):
        raise ValueError(
            f"index is {int(outside[0])}, no slot of a buffer of {slots}; pass the slots that "
            "extend returned."
        )


def read_insertion(data: TensorDictBase, index: Tensor, generation: Tensor) -> Insertion:
    """Copy what clips need to the CPU and split it; arguments as in `ClipCutter.cut`."""
    T = data.numel()
    if index.numel() != T or generation.numel() != T:
        raise ValueError(
            f"data holds {T} transitions, index {index.numel()} slots and generation "
            f"{generation.numel()}; insert data.reshape(-1) and pass the index it returned, or let "
            "AsyncScorer.extend insert, whatever the buffer's transforms leave."
        )
    outcome = _flat(data, _OUTCOME)
    acted_in = _acted_in(data, outcome)
    events, steps = _kept(_flat(data, _NEXT_EVENTS)), _kept(_flat(data, _STEPS))
    span = Span(
        _kept(index.reshape(T)).to(torch.int64).numpy(),
        _kept(generation.reshape(T)).to(torch.int64).numpy(),
        _kept(outcome),
        None if events is None else events.numpy(),
        np.ones(T, np.int64) if steps is None else steps.reshape(T).to(torch.int64).numpy(),
    )
    done = _flat(data, _DONE).reshape(T, -1).any(-1).cpu().numpy()
    row_length = data.shape[-1] if data.ndim > 1 else T
    row = np.arange(T) // row_length
    trajectory = _trajectories(data, row)
    begins = np.append(True, done[:-1] | _changes(trajectory) | _changes(row))
    if acted_in is not None:
        begins |= _breaks(outcome, acted_in, span.steps, begins.cumsum())
    starts = np.flatnonzero(begins)
    stops = np.append(starts[1:], T)
    # In a row of one environment another trajectory follows only where this one ended.
    ended = done[stops - 1] | ((data.ndim > 1) & (stops % row_length != 0))
    first = None if acted_in is None else _kept(acted_in[torch.from_numpy(starts)])
    segments = [
        Segment(
            int(trajectory[start]),
            int(start),
            int(stop),
            bool(end),
            None if first is None else first[i : i + 1],
        )
        for i, (start, stop, end) in enumerate(zip(starts, stops, ended, strict=True))
        if trajectory[start] >= 0  # collectors mark padding with -1
    ]
    return Insertion(span, segments)


def _trajectories(data: TensorDictBase, row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each transition its trajectory; -1 for padding, the row where nothing else is known."""
    ids, valid = data.get(_TRAJECTORY, None), data.get(_MASK, None)
    found = row if ids is None else ids.reshape(-1).cpu().numpy()
    return found if valid is None else np.where(valid.reshape(-1).cpu().numpy(), found, -1)


def _changes(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    changes: NDArray[np.bool_] = values[1:] != values[:-1]
    return changes


def _breaks(
    outcome: Any, acted_in: Any, steps: NDArray[np.int64], stretch: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Before which transitions something is missing, bool ``[T]``.

    Transition i leads to where the one ``steps[i]`` later begins, if both are of one stretch.
    """
    later = np.arange(len(steps)) + steps
    here = np.flatnonzero(later < len(steps))
    here = here[stretch[here] == stretch[later[here]]]
    later = later[here]
    broken = np.zeros(len(steps), np.bool_)
    differ = _differ(outcome[torch.from_numpy(here)], acted_in[torch.from_numpy(later)])
    broken[later[differ.cpu().numpy()]] = True
    return broken


def _acted_in(data: TensorDictBase, outcome: Any) -> Any:
    """Render states that the actions were taken in, if they can be held against ``outcome``."""
    acted_in = _flat(data, RENDER_STATE)
    comparable = outcome is not None and set(_kind(acted_in, None)) == set(_kind(outcome, None))
    return acted_in if comparable else None


def _flat(data: TensorDictBase, key: NestedKey) -> Any:
    """An entry ``[*B, *S]`` as ``[T, *S]``, Tensor or TensorDict; None where there is none."""
    value = data.get(key, None)
    if value is None or is_tensor_collection(value):
        return None if value is None else value.reshape(-1)
    return value.detach().reshape(-1, *value.shape[data.ndim :])


def _kept(value: Any) -> Any:
    """A copy on the CPU: a collector may write its next batch into the same memory."""
    if is_tensor_collection(value):
        return value.apply(_kept, device=_CPU)
    return None if value is None else value.detach().to(_CPU, copy=True)


def _differ(one: Any, other: Any) -> Tensor:
    """Which of n states are not the same, bool ``[n]``; NaN is the same as NaN."""
    if is_tensor_collection(one):
        leaves = one.items(include_nested=True, leaves_only=True)
        return torch.stack([_differ(each, other.get(key)) for key, each in leaves]).any(0)
    same: Tensor = one == other
    if one.is_floating_point():
        same |= one.isnan() & other.isnan()
    return ~same.unsqueeze(-1).flatten(1).all(1)
