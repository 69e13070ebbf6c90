"""Clips for the embedded judge: episodes, which frames a clip shows, and its labels.

T: transitions of an episode, U: distinct states in it, E: events, F: frames shown of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.renderers.minigrid import Cell, MiniGridRenderer
from vlmrb_torchrl.scorers.embedded import TILE_SIZE, WINDOW

EVENT_NAMES = ("goal", "door", "key")
"""What the simulator reports of a transition: the agent came to stand on a goal; a door went
from not open to open; a key was picked up."""
GOAL = 0
VIEW = MiniGridRenderer(tile_size=TILE_SIZE, window=WINDOW)
"""The judge's view, 64 x 64 pixels: one 8-pixel patch of its vision tower is one cell."""


class Episode:
    """One trajectory, each distinct state stored once.

    ``states`` are render states, root first, uint8 ``[T + 1, W, H, 4]``, ``events`` what happened
    in each transition, bool ``[T, E]``.
    """

    def __init__(self, states: np.ndarray, events: np.ndarray) -> None:
        self.events = events
        distinct: dict[bytes, int] = {}
        self.rows = np.array([distinct.setdefault(s.tobytes(), len(distinct)) for s in states])
        first_seen = np.unique(self.rows, return_index=True)[1]
        self.states = states[first_seen]
        """Distinct states, uint8 ``[U, W, H, 4]``; ``rows`` (int ``[T + 1]``) points into it."""

    def __len__(self) -> int:
        return len(self.events)


@dataclass(frozen=True)
class Clip:
    """Consecutive transitions of an episode, some of whose outcome states are shown."""

    episode: Episode
    first: int
    transitions: int
    frames: int

    @property
    def shown(self) -> np.ndarray:
        """Outcomes shown, int ``[F]``, counted from the clip's first transition."""
        return shown_outcomes(self.transitions, self.frames)

    @property
    def rows(self) -> np.ndarray:
        """Which of the episode's distinct states the frames show, int ``[F]``."""
        return np.asarray(self.episode.rows[self.first + 1 + self.shown])

    @property
    def events(self) -> np.ndarray:
        """What happened in each transition, bool ``[transitions, E]``."""
        return self.episode.events[self.first : self.first + self.transitions]

    def visible(self) -> np.ndarray:
        """The label taught, bool ``[E]``: the event happened and its frames can show it.

        A door opened or a key picked up before the first frame shown looks just like a door open
        or a key carried all along. "Do not guess": such a clip is a No.
        """
        label = np.asarray(self.events.any(0))
        label[1:] = self.events[self.shown[0] + 1 :, 1:].any(0)
        return label

    def visible_by_frame(self) -> np.ndarray:
        """Which frame shows what, bool ``[F, E]``: a goal stood on, a change since the last."""
        counts = np.cumsum(self.events, axis=0)[self.shown]
        label = np.diff(counts, axis=0, prepend=counts[:1]) > 0
        label[:, GOAL] = counts[:, GOAL] > 0
        return np.asarray(label)


class ClipSampler:
    """Draws labelled clips of ``episodes``, hard negatives among them."""

    def __init__(self, episodes: Sequence[Episode], random: np.random.Generator) -> None:
        self.episodes = episodes
        self.random = random
        weights = np.array([len(e) for e in episodes], dtype=float)
        self._cumulative = np.cumsum(weights / weights.sum())
        self._moments = [
            [(e, int(t)) for e in episodes for t in np.flatnonzero(e.events[:, k])]
            for k in range(len(EVENT_NAMES))
        ]

    def draw(self, question: int, answer: bool, transitions: int, frames: int) -> Clip:
        """A clip for ``question``, of ``EVENT_NAMES`` by number, whose taught label is ``answer``.

        It covers fewer than ``transitions`` where the episode is shorter, and now and then on
        purpose (an episode's last clip is short).
        """
        while True:
            length = transitions
            if self.random.random() < 0.2:
                length = int(self.random.integers(1, transitions + 1))
            clip = self._propose(question, answer, length, frames)
            if clip and clip.visible()[question] == answer:
                return clip

    def _propose(self, question: int, answer: bool, length: int, frames: int) -> Clip | None:
        random = self.random
        mode = random.random()
        if not answer and mode < 0.3:  # anything at all
            index = int(np.searchsorted(self._cumulative, random.random()))
            episode = self.episodes[min(index, len(self.episodes) - 1)]
            size = len(episode)
            first = int(random.integers(0, max(1, size - length + 1)))
        else:
            other = not answer and mode < 0.5
            about = int(random.integers(len(EVENT_NAMES))) if other else question
            episode, moment = self._moments[about][int(random.integers(len(self._moments[about])))]
            size = len(episode)
            if answer or other:  # the event anywhere inside
                first = moment - int(random.integers(0, min(length, moment + 1)))
            elif mode < 0.8:  # the clip ends one transition before the event
                first, size = max(0, moment - length), moment
            else:  # the door is open, the key is carried, from the first frame on
                first = moment + int(random.random() < 0.5)
        covered = min(length, size - first)
        return Clip(episode, first, covered, frames) if covered > 0 else None


def render(states: Sequence[np.ndarray], renderer: MiniGridRenderer = VIEW) -> Tensor:
    """Draw states of different grid sizes, uint8 ``[len(states), 3, H, W]``."""
    frames: list[Tensor] = [torch.empty(0)] * len(states)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for k, state in enumerate(states):
        by_shape.setdefault(state.shape, []).append(k)
    for places in by_shape.values():
        drawn = renderer(torch.from_numpy(np.stack([states[k] for k in places])))
        for k, frame in zip(places, drawn, strict=True):
            frames[k] = frame
    return torch.stack(frames)


OTHER, EMPTY, WALL, OPEN_DOOR, SHUT_DOOR, KEY, ON_GOAL = range(7)
CELL_CLASSES = 7
_CLASS_OF_KIND = {0: EMPTY, 1: EMPTY, 2: WALL, 3: EMPTY, 5: KEY, 8: ON_GOAL}


def _label_sprites(cell: Cell, tile_size: int) -> np.ndarray:
    """A "tile" whose three colour channels are class of the cell, agent there, its direction."""
    kind = _CLASS_OF_KIND.get(cell.kind, OTHER)
    if cell.kind == 4:
        kind = OPEN_DOOR if cell.state == 0 else SHUT_DOOR
    pixel = np.array([kind, cell.agent > 0, max(cell.agent - 1, 0)], dtype=np.uint8)
    return np.broadcast_to(pixel, (tile_size, tile_size, 3))


LABEL_VIEW = MiniGridRenderer(tile_size=1, window=WINDOW, sprites=_label_sprites)
"""Draws, in the judge's own window, what each cell is: the targets of the vision stage."""


def draw_spec(random: np.random.Generator, longest: int) -> tuple[int, int]:
    """Transitions and frames of a training clip, frames at most ``longest``.

    Half of the clips show every transition, the others every second to fourth.
    """
    choices = [f for f in (2, 4, 8, 16, 24, 32, 48, 64) if f <= longest]
    frames = int(random.choice(choices[-3:]))
    stride = 1.0 if random.random() < 0.5 else float(random.choice([2.0, 3.0, 4.0]))
    return math.ceil(frames * stride), frames
