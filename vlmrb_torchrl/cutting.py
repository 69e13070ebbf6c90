"""Cuts what is inserted into a replay buffer into clips, whatever the batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import is_whole, shown
from vlmrb_torchrl.clips import Clip
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.insertions import Kind, Span, check_transitions, join, read_insertion
from vlmrb_torchrl.keys import RENDER_STATE

_PATIENCE_TRANSITIONS = 1024
"""A trajectory is given up only after this many transitions of others, so that inserting one
transition at a time (of up to as many environments) does not cut every clip short."""


@dataclass(slots=True)
class _Track:
    """The open clip of one trajectory: its transitions from the clip's start on."""

    pieces: list[Span]
    length: int = 0  # transitions held
    covered: int = 0  # of them, from the first, already in a clip that was cut
    skip: int = 0  # transitions to pass over before the next clip starts (stride > length)
    seen_batch: int = 0
    seen_transition: int = 0

    def head(self, transitions: int) -> Span:
        """The first ``transitions`` held, in one span."""
        parts, missing = [], transitions
        for piece in self.pieces:
            parts.append(piece.cut(0, missing))
            missing -= len(piece.slot)
            if missing <= 0:
                break
        return join(parts)

    def drop(self, transitions: int) -> None:
        """Let go of the first ``transitions``, held or yet to come."""
        self.skip = max(0, transitions - self.length)
        self.length = max(0, self.length - transitions)
        while self.pieces and transitions > 0:
            held = len(self.pieces[0].slot)
            if held > transitions:
                self.pieces[0] = self.pieces[0].cut(transitions, held)
            else:
                del self.pieces[0]
            transitions -= held


class ClipCutter:
    """Cuts what is inserted into a replay buffer into clips, whatever the batches.

    A trajectory's clips start every ``stride`` transitions. Its end closes the open clip, which
    then may be shorter; with ``stride <= clip_transitions`` every transition lies in a clip. A
    trajectory that stops without ``done`` (its environment was reset, its worker died) is closed
    when its environment shows another one, or after ``patience`` batches without it.

    Args:
        clip_transitions: Transitions that a clip covers.
        frames_per_clip: Outcome states of them that are shown.
        stride: Transitions from one clip's start to the next; None: ``clip_transitions``.
        needs: Which of ``"render_state"`` and ``"events"`` must be there, under ``"next"``.
        patience: Insertion batches after which an unseen trajectory is given up. Collectors with
            many asynchronous workers want more than they have workers.

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
        stride = clip_transitions if stride is None else stride
        for name, value in (
            ("clip_transitions", clip_transitions),
            ("frames_per_clip", frames_per_clip),
            ("stride", stride),
            ("patience", patience),
        ):
            if not is_whole(value, 1):
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number >= 1.")
        self.clip_transitions = clip_transitions
        self.frames_per_clip = frames_per_clip
        self.stride = stride
        self.needs = needs
        self.patience = patience
        self.transitions = 0  # seen so far
        self._batches = 0
        self._kind: Kind = ()  # of what is held open
        self._tracks: dict[tuple[int, int], _Track] = {}  # by source and id, longest unseen first

    def __len__(self) -> int:
        """Transitions in open clips, those already in an earlier clip included."""
        return sum(track.length for track in self._tracks.values())

    def cut(
        self, data: TensorDictBase, index: Tensor, generation: Tensor, source: int = 0
    ) -> list[Clip]:
        """Take in one insertion batch; return the clips that it completes.

        A clip ends where the next action was not taken in the state that the last one led to, as
        far as ``"render_state"`` and ``("next", "render_state")`` tell.

        Args:
            data: Transitions, ``[T]`` (trajectories one after the other) or ``[..., T]`` (one
                environment a row), with ``("next", "done")``, ``("next", "render_state")``,
                optionally ``"render_state"``, ``("next", "events")`` and ``("collector",
                "traj_ids")``. Without trajectory ids each row is one environment, and ``[T]`` is
                split by ``done`` and by the render states alone.
            index: Their slots, as many as there are transitions, in the order of
                ``data.reshape(-1)``.
            generation: The slots' stamps, of the same shape.
            source: Which collector wrote them: each counts its trajectories from 0.

        Raises:
            KeyError: If a key is missing, or ``[T]`` has neither ids nor render states.
            ValueError: If the numbers of transitions differ, or the transitions are of another
                kind than those of the open clips. Nothing was taken in.
        """
        kind = self.check(data)
        insertion = read_insertion(data, index, generation)
        self._kind = kind
        self._batches += 1
        clips: list[Clip] = []
        for segment in insertion.segments:
            key = source, segment.trajectory
            track = self._tracks.pop(key, None)
            if track is None:
                track = _Track([])
            elif track.pieces and not segment.follows(track.pieces[-1]):
                # Trajectory ids start at 0 again with every new collector: the states tell.
                self._close(track, clips)
                track = _Track([])
            self._append(track, insertion.span.cut(segment.start, segment.stop), clips)
            if segment.ended:
                self._close(track, clips)
            else:
                track.seen_batch, track.seen_transition = self._batches, self.transitions
                self._tracks[key] = track
        self._give_up(clips)
        return clips

    def check(self, data: TensorDictBase) -> Kind:
        """Refuse transitions that `cut` would, see there; return what kind they are."""
        kind = check_transitions(data, self.needs)
        if self._tracks and self._kind and kind != self._kind:
            raise ValueError(
                f"data now holds {kind} a transition, earlier {self._kind} (shape of the events; "
                "key, dtype, shape of what is rendered): insert what one environment writes."
            )
        return kind

    def flush(self) -> list[Clip]:
        """Close every open clip and return them: the trajectories go on in new ones."""
        clips: list[Clip] = []
        for track in self._tracks.values():
            self._close(track, clips)
        self._tracks.clear()
        return clips

    def _append(self, track: _Track, span: Span, clips: list[Clip]) -> None:
        length = len(span.slot)
        self.transitions += length
        skipped = min(track.skip, length)
        track.skip -= skipped
        if skipped == length:
            return
        track.pieces.append(span.cut(skipped, length) if skipped else span)
        track.length += length - skipped
        while track.length >= self.clip_transitions:
            clips.append(self._clip(track.head(self.clip_transitions)))
            track.drop(self.stride)
            track.covered = max(0, self.clip_transitions - self.stride)

    def _close(self, track: _Track, clips: list[Clip]) -> None:
        if track.length > track.covered:
            clips.append(self._clip(track.head(track.length)))

    def _clip(self, span: Span) -> Clip:
        shown = shown_outcomes(len(span.slot), self.frames_per_clip)
        return Clip(
            index=span.slot.copy(),
            generation=span.generation.copy(),
            render_state=None if span.outcome is None else span.outcome[torch.from_numpy(shown)],
            events=None if span.events is None else np.asarray(span.events.any(0)),
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
                key: {
                    "held": track.head(track.length).state_dict() if track.length else None,
                    "covered": track.covered,
                    "skip": track.skip,
                    "seen": (track.seen_batch, track.seen_transition),
                }
                for key, track in self._tracks.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Only environments that go on, too, with the same trajectory ids, can complete the open
        clips. Where they start afresh, call `flush` next.
        """
        tracks, kind = {}, self._kind
        for key, saved in state["tracks"].items():
            held = [] if saved["held"] is None else [Span.from_state_dict(saved["held"])]
            length, seen = sum(len(span.slot) for span in held), saved["seen"]
            tracks[key] = _Track(held, length, saved["covered"], saved["skip"], seen[0], seen[1])
            kind = held[0].kind if held else kind
        self.transitions, self._batches = state["transitions"], state["batches"]
        self._tracks, self._kind = tracks, kind
