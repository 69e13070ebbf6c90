"""Cuts what is inserted into a replay buffer into clips, whatever the batches.

A clip covers consecutive transitions of one trajectory and shows the states that they lead to.
How many transitions it covers and how many frames of it are shown are two numbers: 128
transitions shown as 32 frames cost a quarter of the judge's time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from vlmrb_torchrl.checks import is_whole, require, shown
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.keys import EVENTS, RENDER_STATE

_TRAJECTORY = ("collector", "traj_ids")
_MASK = ("collector", "mask")
_DONE = ("next", "done")
_STEPS = "steps_to_next_obs"
"""Where TorchRL's n-step transforms write how many steps a transition spans."""
_TENSORS = ("outcome", "render_state")
"""What stays a tensor; small arrays are numpy's, which is several times faster on them."""
_PATIENCE_TRANSITIONS = 1024
"""A trajectory is given up only after this many transitions of others, so that inserting one
transition at a time (of up to as many environments) does not cut every clip short."""

Span: TypeAlias = dict[str, Any]
"""Consecutive transitions, on the CPU: ``slot``, ``generation``, ``steps``, int64 ``[T]``, and, if
the data has them, ``outcome``, the render states that they lead to (Tensor or TensorDict
``[T, *S]``), and ``events``, bool ``[T, E]``. Transition i leads to where i + steps[i] begins."""


@dataclass(eq=False)
class Clip:
    """One clip. n: transitions covered, F: frames shown, E: events.

    Attributes:
        index: Slots of the covered transitions, int64 ``[n]``.
        generation: Their stamps when they were inserted, int64 ``[n]``.
        render_state: States shown, ``[F, *S]``, on the CPU; None if the data has none.
        events: What happened in any covered transition, bool ``[E]``; None if the data has none.
        cut_at: Transitions that the cutter had seen when it cut this clip.
        queued_at: When it was handed to the scorer, as of ``time.monotonic``.
    """

    index: NDArray[np.int64]
    generation: NDArray[np.int64]
    render_state: Any  # Tensor or TensorDict
    events: NDArray[np.bool_] | None
    cut_at: int
    queued_at: float = 0.0

    def __len__(self) -> int:
        return len(self.index)

    def state_dict(self) -> dict[str, Any]:
        """The attributes but ``queued_at``, as tensors and numbers."""
        return _to_state({k: v for k, v in vars(self).items() if k != "queued_at"})

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Clip:
        """The inverse of `state_dict`."""
        return cls(**_from_state(state))


def stack_clips(clips: Sequence[Clip]) -> TensorDict:
    """Clips as the TensorDict that scorers read: ``"render_state"`` and ``"events"``, batch [B]."""
    states = [clip.render_state for clip in clips if clip.render_state is not None]
    events = [clip.events for clip in clips if clip.events is not None]
    batch = TensorDict({}, [len(clips)])
    if states:
        batch.set(RENDER_STATE, torch.stack(states))
    if events:
        batch.set(EVENTS, torch.from_numpy(np.stack(events)))
    return batch


@dataclass
class _Track:
    """The open clip of one trajectory."""

    held: Span  # its transitions from the clip's start on
    covered: int = 0  # of them, from the first, already in a clip that was cut
    skip: int = 0  # transitions to pass over before the next clip starts (stride > length)
    seen_batch: int = 0
    seen_transition: int = 0


class ClipCutter:
    """Cuts what is inserted into a replay buffer into clips, whatever the batches.

    A trajectory's clips start every ``stride`` transitions. Its end closes the open clip, which
    then may be shorter; with ``stride <= clip_transitions`` every transition lies in a clip. A
    trajectory that stops without ``done`` (its environment was reset, its worker died) is closed
    when its environment shows another one, or after ``patience`` batches without it.

    Args:
        clip_transitions: As of `AsyncScorer`, like the next two and ``patience``.
        frames_per_clip: See there.
        stride: See there.
        needs: Which of ``"render_state"`` and ``"events"`` must be there, under ``"next"``.
        patience: See there.

    Raises:
        ValueError: If one of the numbers is no whole number from 1 on.

    Example:
        >>> cutter = ClipCutter(clip_transitions=32, frames_per_clip=32)
        >>> index = buffer.extend(data)
        >>> clips = cutter.cut(data, index, buffer.generations_of(index))
    """

    def __init__(
        self,
        clip_transitions: int = 32,
        frames_per_clip: int = 32,
        stride: int | None = None,
        *,
        needs: Collection[str] = (RENDER_STATE,),
        patience: int = 8,
    ) -> None:
        self.clip_transitions, self.frames_per_clip = clip_transitions, frames_per_clip
        self.stride = clip_transitions if stride is None else stride
        self.patience, self.needs = patience, needs
        for name in ("clip_transitions", "frames_per_clip", "stride", "patience"):
            value = getattr(self, name)
            require(is_whole(value, 1), name, value, "use a whole number from 1 on")
        self.transitions = 0  # seen so far
        self._batches = 0
        self._tracks: dict[tuple[int, int], _Track] = {}  # by source and id, longest unseen first

    def __len__(self) -> int:
        """Transitions in open clips, those already in an earlier clip included."""
        return sum(len(track.held["slot"]) for track in self._tracks.values())

    def cut(
        self, data: TensorDictBase, index: Tensor, generation: Tensor, source: int = 0
    ) -> list[Clip]:
        """Take in one insertion batch; return the clips that it completes.

        A clip ends where the next action was not taken in the state that the last one led to, as
        far as ``"render_state"`` and ``("next", "render_state")`` tell.

        Args:
            data: As of `AsyncScorer.extend`. Without trajectory ids each row of ``[..., T]`` is one
                environment, and ``[T]`` is split by ``done`` and by the render states alone.
            index: Their slots, as many as there are transitions, in the order of
                ``data.reshape(-1)``.
            generation: The slots' stamps, of the same shape.
            source: Which collector wrote them: each counts its trajectories from 0.

        Raises:
            TypeError: If ``data`` is no TensorDict.
            KeyError: If a key is missing, or ``[T]`` has neither ids nor render states.
            ValueError: If there are no transitions, their numbers differ, or they are of another
                kind than those of the open clips. Nothing was taken in.
        """
        self.check(data)
        T = data.numel()
        if index.numel() != T or generation.numel() != T:
            raise ValueError(
                f"data holds {T} transitions, index {index.numel()} slots and generation "
                f"{generation.numel()}; insert data.reshape(-1) and pass the index it returned, or "
                "let AsyncScorer.extend insert, whatever the buffer's transforms leave."
            )
        span, acted_in = _read(data, index, generation), _acted_in(data)
        self._batches += 1
        clips: list[Clip] = []
        for trajectory, start, stop, ended in _segments(data, span, acted_in):
            key = source, trajectory
            track = self._tracks.pop(key, None)
            if track is None or not _follows(track.held, acted_in, start):
                if track is not None:
                    # Trajectory ids start at 0 again with every new collector: the states tell.
                    self._close(track, clips)
                track = _Track(_cut(span, 0, 0))
            self._append(track, _cut(span, start, stop), clips)
            if ended:
                self._close(track, clips)
            else:
                track.seen_batch, track.seen_transition = self._batches, self.transitions
                self._tracks[key] = track
        self._give_up(clips)
        return clips

    def check(self, data: TensorDictBase) -> None:
        """Refuse transitions that `cut` would; see there."""
        if not isinstance(data, TensorDictBase):
            raise TypeError(f"data is {shown(data)}; pass the TensorDict that was inserted.")
        if 0 in data.shape:
            raise ValueError(f"data is of shape {list(data.shape)}; pass one transition or more.")
        keys = data.keys(include_nested=True)
        if _DONE not in keys:
            raise KeyError(f"data has no {_DONE}: a clip ends where its trajectory does.")
        for need in self.needs:
            if ("next", need) not in keys:
                raise KeyError(
                    f"data has no {('next', need)}, which the scorer wants: let the environment "
                    f'write "{need}" and the buffer keep it, or use a scorer that does without.'
                )
        if data.ndim < 2 and _TRAJECTORY not in keys and _acted_in(data) is None:
            raise KeyError(
                f"data of shape {list(data.shape)} has neither {_TRAJECTORY} nor render states, so "
                "nothing tells one environment's transitions from another's: pass it as [N, T], "
                "one environment a row, or let the collector track trajectory ids."
            )
        track = next(iter(self._tracks.values()), None)
        if track is not None and (now := _kind(_seen(data))) != (earlier := _kind(track.held)):
            raise ValueError(
                f"data now holds {now} a transition, earlier {earlier} (shape of the events; key, "
                "dtype, shape of what is rendered): insert what one environment writes."
            )

    def flush(self) -> list[Clip]:
        """Close every open clip and return them: the trajectories go on in new ones."""
        clips: list[Clip] = []
        for track in self._tracks.values():
            self._close(track, clips)
        self._tracks.clear()
        return clips

    def _append(self, track: _Track, span: Span, clips: list[Clip]) -> None:
        length = len(span["slot"])
        self.transitions += length
        skipped = min(track.skip, length)
        track.skip -= skipped
        track.held = _join(track.held, _cut(span, skipped, length))
        while (length := len(track.held["slot"])) >= self.clip_transitions:
            clips.append(self._clip(_cut(track.held, 0, self.clip_transitions)))
            track.held = _cut(track.held, self.stride, length)
            track.skip = max(0, self.stride - length)
            track.covered = max(0, self.clip_transitions - self.stride)

    def _close(self, track: _Track, clips: list[Clip]) -> None:
        if len(track.held["slot"]) > track.covered:
            clips.append(self._clip(track.held))

    def _clip(self, span: Span) -> Clip:
        frames = torch.from_numpy(shown_outcomes(len(span["slot"]), self.frames_per_clip))
        return Clip(
            index=span["slot"].copy(),
            generation=span["generation"].copy(),
            render_state=span["outcome"][frames] if "outcome" in span else None,
            events=np.asarray(span["events"].any(0)) if "events" in span else None,
            cut_at=self.transitions,
        )

    def _give_up(self, clips: list[Clip]) -> None:
        for key, track in list(self._tracks.items()):
            if (
                self._batches - track.seen_batch < self.patience
                or self.transitions - track.seen_transition < _PATIENCE_TRANSITIONS
            ):
                break  # the rest was seen later
            self._close(self._tracks.pop(key), clips)

    def state_dict(self) -> dict[str, Any]:
        """The open clips and the counters, as numbers and tensors."""
        return {
            "transitions": self.transitions,
            "batches": self._batches,
            "tracks": {
                key: {**vars(track), "held": _to_state(track.held)}
                for key, track in self._tracks.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Only environments that go on, too, with the same trajectory ids, can complete the open
        clips. Where they start afresh, call `flush` next.
        """
        tracks = {
            key: _Track(**{**track, "held": _from_state(track["held"])})
            for key, track in state["tracks"].items()
        }
        self.transitions, self._batches = state["transitions"], state["batches"]
        self._tracks = tracks


# ---------------------------------------------------------------- reading a batch


def _read(data: TensorDictBase, index: Tensor, generation: Tensor) -> Span:
    """Copy what clips need: a collector may write its next batch into the same memory."""
    T = data.numel()
    steps = _flat(data, _STEPS)
    numbers = {
        "slot": index,
        "generation": generation,
        "steps": torch.ones(T) if steps is None else steps,
    }
    span: Span = {
        name: value.detach().reshape(T).to("cpu", torch.int64, copy=True).numpy()
        for name, value in numbers.items()
    }
    for name, value in _seen(data).items():
        kept = value.cpu().clone()
        span[name] = kept.numpy() if name == "events" else kept
    return span


def _segments(data: TensorDictBase, span: Span, acted_in: Any) -> list[tuple[int, int, int, bool]]:
    """The stretches of single trajectories: whose, from, to before, whether it ends there."""
    T = data.numel()
    done = _flat(data, _DONE).reshape(T, -1).any(-1).cpu().numpy()
    row_length = data.shape[-1] if data.ndim > 1 else T
    row = np.arange(T) // row_length
    ids, valid = data.get(_TRAJECTORY, None), data.get(_MASK, None)
    trajectory = row if ids is None else ids.reshape(-1).cpu().numpy()
    if valid is not None:  # -1 marks the padding of a collector
        trajectory = np.where(valid.reshape(-1).cpu().numpy(), trajectory, -1)
    begins = np.ones(T, np.bool_)
    begins[1:] = done[:-1] | (trajectory[1:] != trajectory[:-1]) | (row[1:] != row[:-1])
    if acted_in is not None:
        # Transition i leads to where the one steps[i] later begins, if both are of one stretch.
        stretch, later = begins.cumsum(), np.arange(T) + span["steps"]
        here = np.flatnonzero(later < T)
        here = here[stretch[here] == stretch[later[here]]]
        later = later[here]
        differ = _differ(span["outcome"][torch.from_numpy(here)], acted_in[torch.from_numpy(later)])
        begins[later[differ.numpy()]] = True
    starts = np.flatnonzero(begins)
    stops = np.append(starts[1:], T)
    # In a row of one environment another trajectory follows only where this one ended.
    ended = done[stops - 1] | ((data.ndim > 1) & (stops % row_length != 0))
    stretches = zip(trajectory[starts], starts, stops, ended, strict=True)
    return [(int(id), int(a), int(b), bool(end)) for id, a, b, end in stretches if id >= 0]


def _follows(held: Span, acted_in: Any, start: int) -> bool:
    """Whether the action of transition ``start`` was taken where ``held`` led, if that is known."""
    length = len(held["slot"])
    last = np.flatnonzero(np.arange(length) + held["steps"] == length)[-1:]
    if acted_in is None or not len(last):
        return True
    return not _differ(held["outcome"][torch.from_numpy(last)], acted_in[start : start + 1]).any()


def _seen(data: TensorDictBase) -> dict[str, Any]:
    """What a judge may see of each transition, ``[T, ...]``, where the data has it."""
    entries = {"outcome": ("next", RENDER_STATE), "events": ("next", EVENTS)}
    found = {name: _flat(data, key) for name, key in entries.items()}
    return {name: value for name, value in found.items() if value is not None}


def _acted_in(data: TensorDictBase) -> Any:
    """Render states that the actions were taken in, if they can be held against the outcomes."""
    acted_in, seen = _flat(data, RENDER_STATE), _seen(data)
    if acted_in is None or "outcome" not in seen:
        return None
    kinds = [set(_kind({"outcome": states})) for states in (acted_in, seen["outcome"])]
    return acted_in.cpu() if kinds[0] == kinds[1] else None


def _kind(span: Span) -> tuple[object, ...]:
    """What spans must share to be joined: the shape of events; key, dtype and shape of states."""
    shape = tuple(span["events"].shape[1:]) if "events" in span else None
    states: Any = span.get("outcome")
    leaves = states.items(True, True) if is_tensor_collection(states) else [("", states)]
    return shape, *((k, leaf.dtype, leaf.shape[1:]) for k, leaf in leaves if leaf is not None)


def _differ(one: Any, other: Any) -> Tensor:
    """Which of n states are not the same, bool ``[n]``; NaN is the same as NaN."""
    if is_tensor_collection(one):
        return torch.stack([_differ(leaf, other[k]) for k, leaf in one.items(True, True)]).any(0)
    same: Tensor = one == other
    if one.is_floating_point():
        same |= one.isnan() & other.isnan()
    return ~same.unsqueeze(-1).flatten(1).all(1)


def _flat(data: TensorDictBase, key: NestedKey) -> Any:
    """An entry ``[*B, *S]`` as ``[T, *S]``, Tensor or TensorDict; None where there is none."""
    value = data.get(key, None)
    if value is None or is_tensor_collection(value):
        return None if value is None else value.detach().reshape(-1)
    return value.detach().reshape(-1, *value.shape[data.ndim :])


def _cut(span: Span, start: int, stop: int) -> Span:
    """A view of the transitions from ``start`` to before ``stop``."""
    return {name: value[start:stop] for name, value in span.items()}


def _join(one: Span, other: Span) -> Span:
    if not len(one["slot"]):
        return other
    return {
        name: (np.concatenate if isinstance(value, np.ndarray) else torch.cat)([value, other[name]])
        for name, value in one.items()
    }


def _to_state(values: dict[str, Any]) -> dict[str, Any]:
    """With tensors for arrays, as ``torch.load(weights_only=True)`` reads them, and no views."""

    def saved(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        return value.clone() if isinstance(value, (Tensor, TensorDictBase)) else value

    return {name: saved(value) for name, value in values.items()}


def _from_state(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.numpy() if isinstance(value, Tensor) and name not in _TENSORS else value
        for name, value in state.items()
    }
