"""The books of a scorer: what became of every clip, how fast, and which ones to show."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmrb_torchrl.checks import is_whole, shown
from vlmrb_torchrl.clips import Clip

_YES = 0.5
"""A score from here on counts as positive, as in the sampler's default threshold."""
_WINDOW_SECONDS = 30.0
"""Rates and latencies are those of the answers of this many last seconds."""

_FATES = ("submitted", "scored", "late", "dropped", "failed")
_FAULTS = ("raised", "invalid", "unavailable", "timeout", "died", "write")


@dataclass(slots=True, eq=False)
class Ticket:
    """A clip on its way to the scorer, and when (``time.monotonic``) it set out."""

    clip: Clip
    queued_at: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class _Answers:
    """One batch of answers: when it came, its clips, and its summed latencies."""

    at: float
    clips: int
    seconds: float
    env_steps: int


class Ledger:
    """Counts clips and transitions by their fate. Safe from several threads.

    Of the clips submitted, each is scored (its score was written), late (every one of its slots
    was overwritten before), dropped (the queue was full), failed (the scorer gave no score) or
    still pending. The same holds for the transitions they cover; a transition in two clips
    counts twice.

    Args:
        seed: Chooses the random clip of `showcase`.
    """

    def __init__(self, seed: int = 0) -> None:
        if not is_whole(seed, 0):
            raise ValueError(f"seed is {shown(seed)}; choose a whole number >= 0.")
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._count = {
            **{f"clips_{fate}": 0 for fate in _FATES},
            **{f"transitions_{fate}": 0 for fate in _FATES},
            **{f"faults_{kind}": 0 for kind in _FAULTS},
            "clips_positive": 0,
            "retries": 0,
        }
        self._seen: set[str] = set()  # kinds of faults, those of a loaded state not among them
        self._answers: deque[_Answers] = deque()
        self._started = time.monotonic()
        self._best: tuple[Clip, float] | None = None
        self._any: tuple[Clip, float] | None = None
        self._since_shown = 0

    def submitted(self, clips: Sequence[Clip]) -> None:
        """Note clips that were queued."""
        self._add("submitted", len(clips), sum(map(len, clips)))

    def dropped(self, clips: Sequence[Clip]) -> None:
        """Note clips that left the queue unscored."""
        self._add("dropped", len(clips), sum(map(len, clips)))

    def failed(self, clips: Sequence[Clip]) -> None:
        """Note clips that the scorer gave no score for."""
        self._add("failed", len(clips), sum(map(len, clips)))

    def _add(self, fate: str, clips: int, transitions: int) -> None:
        with self._lock:
            self._count[f"clips_{fate}"] += clips
            self._count[f"transitions_{fate}"] += transitions

    def fault(self, kind: str, retried: bool) -> bool:
        """Note a fault; return whether it is the first of its kind in this process."""
        with self._lock:
            self._count[f"faults_{kind}"] += 1
            self._count["retries"] += retried
            first = kind not in self._seen
            self._seen.add(kind)
            return first

    def answered(
        self,
        tickets: Sequence[Ticket],
        scores: NDArray[np.float32],
        live: Sequence[int],
        env_steps: int,
    ) -> None:
        """Note scores that were written.

        Args:
            tickets: The clips.
            scores: Their scores, ``[B]``.
            live: Per clip, how many of its transitions were still in the buffer.
            env_steps: Transitions inserted into the buffer until now.
        """
        now = time.monotonic()
        with self._lock:
            for ticket, score, written in zip(tickets, scores.tolist(), live, strict=True):
                fate = "scored" if written else "late"
                self._count[f"clips_{fate}"] += 1
                self._count["transitions_scored"] += written
                self._count["transitions_late"] += len(ticket.clip) - written
                self._count["clips_positive"] += score >= _YES
                self._consider(ticket.clip, score)
            self._answers.append(
                _Answers(
                    now,
                    len(tickets),
                    sum(now - ticket.queued_at for ticket in tickets),
                    sum(env_steps - ticket.clip.cut_at for ticket in tickets),
                )
            )
            self._forget(now)

    def _consider(self, clip: Clip, score: float) -> None:
        self._since_shown += 1
        if self._best is None or score > self._best[1]:
            self._best = (clip, score)
        if self._random.randrange(self._since_shown) == 0:  # each equally likely
            self._any = (clip, score)

    def _forget(self, now: float) -> None:
        while self._answers and now - self._answers[0].at > _WINDOW_SECONDS:
            self._answers.popleft()

    def statistics(self) -> dict[str, float]:
        """All counts, and clips/s and latencies of the last 30 seconds."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            clips = sum(answer.clips for answer in self._answers)
            seconds = sum(answer.seconds for answer in self._answers)
            env_steps = sum(answer.env_steps for answer in self._answers)
            window = max(min(_WINDOW_SECONDS, now - self._started), 1e-9)
            counts = {name: float(count) for name, count in self._count.items()}
            for unit in ("clips", "transitions"):
                done = sum(counts[f"{unit}_{fate}"] for fate in _FATES[1:])
                counts[f"{unit}_pending"] = counts[f"{unit}_submitted"] - done
            return {
                **counts,
                "clips_per_s": clips / window,
                "latency_s": seconds / max(clips, 1),
                "latency_env_steps": env_steps / max(clips, 1),
            }

    def pop_shown(self) -> dict[str, tuple[Clip, float]]:
        """The best-scored and a random clip of those answered since the last call."""
        with self._lock:
            shown = {"best": self._best, "random": self._any}
            self._best = self._any = None
            self._since_shown = 0
            return {name: entry for name, entry in shown.items() if entry is not None}

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        with self._lock:
            return dict(self._count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from ``state``; what was pending then counts once it is queued again.

        Raises:
            ValueError: If it does not hold each count, and nothing else; nothing has changed then.
        """
        with self._lock:
            if state.keys() != self._count.keys() or not all(
                is_whole(n, 0) for n in state.values()
            ):
                raise ValueError(f"counts must be whole numbers, one of each kind, got {state}")
            self._count.update(state)
            for unit in ("clips", "transitions"):
                done = sum(self._count[f"{unit}_{fate}"] for fate in _FATES[1:])
                self._count[f"{unit}_submitted"] = done
