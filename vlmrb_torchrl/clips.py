"""What a clip is, and how its frames are drawn.

A clip covers consecutive transitions of one trajectory and shows the states that they lead to.
How many transitions it covers and how many frames of it are shown are two numbers: 128
transitions shown as 32 frames cost a quarter of the judge's time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, Transform

from vlmrb_torchrl.keys import CLIP, EVENTS, RENDER_STATE


@dataclass(slots=True, eq=False)
class Clip:
    """One clip. n: transitions covered, F: frames shown, E: events.

    Attributes:
        index: Slots of the covered transitions, int64 ``[n]``.
        generation: Their stamps when they were inserted, int64 ``[n]``.
        render_state: States shown, ``[F, *S]``, on the CPU; None if the data has none.
        events: What happened in any covered transition, bool ``[E]``; None if the data has none.
        cut_at: Transitions that the cutter had seen when it cut this clip.
    """

    index: NDArray[np.int64]
    generation: NDArray[np.int64]
    render_state: Any  # Tensor or TensorDict
    events: NDArray[np.bool_] | None
    cut_at: int

    def __len__(self) -> int:
        return len(self.index)

    def state_dict(self) -> dict[str, Any]:
        """The attributes, as tensors and numbers."""
        return {
            "index": torch.from_numpy(self.index),
            "generation": torch.from_numpy(self.generation),
            "render_state": self.render_state,
            "events": None if self.events is None else torch.from_numpy(self.events),
            "cut_at": self.cut_at,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Clip:
        """The inverse of `state_dict`."""
        events = state["events"]
        return cls(
            state["index"].numpy(),
            state["generation"].numpy(),
            state["render_state"],
            None if events is None else events.numpy(),
            state["cut_at"],
        )


def check_clip_keys(transform: Transform | None, scorer: TensorDictModuleBase) -> None:
    """Refuse a transform, or a scorer behind it, that reads what no clip holds.

    Raises:
        ValueError: If so, for every clip would fail.
    """
    held, known = {RENDER_STATE, EVENTS}, True
    for part in () if transform is None else transform.modules():
        if isinstance(part, Transform) and not isinstance(part, Compose):
            if missing := [key for key in part.in_keys if key not in held]:
                raise ValueError(
                    f"transform reads {missing}, but clips hold {sorted(held)}: build "
                    "ClipRenderTransform(renderer) with its own keys."
                )
            held.update(part.out_keys)
            known = known and bool(part.out_keys)
    if CLIP not in scorer.in_keys:  # then nothing is drawn for it
        held, known = {RENDER_STATE, EVENTS}, True
    missing = [key for key in scorer.in_keys if key not in held]
    if missing and known:
        raise ValueError(
            f"scorer reads {missing}, but with this transform clips hold {sorted(held)}: build "
            "ClipRenderTransform(renderer) with its own keys."
        )


def check_slots(clips: Iterable[Clip], capacity: int) -> None:
    """Refuse clips whose transitions cannot lie in a buffer of ``capacity`` slots.

    Raises:
        ValueError: If a slot is out of range or has no generation.
    """
    for clip in clips:
        index, generation = clip.index, clip.generation
        if not (index.dtype == generation.dtype == np.int64 and index.shape == generation.shape):
            raise ValueError("a clip's index and generation must be int64 of one length")
        if not ((index >= 0) & (index < capacity)).all():
            raise ValueError(f"a clip's slots must be 0 to {capacity - 1}, got {index}")


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
