"""The thread between learner and scorer: takes clips from the queue, writes scores back."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vlmrb_torchrl.checks import MOST_SECONDS, is_positive, is_real, is_whole, shown
from vlmrb_torchrl.clips import Clip, stack_clips
from vlmrb_torchrl.scoring_backends import Backend
from vlmrb_torchrl.scoring_ledger import Ledger, Ticket
from vlmrb_torchrl.scoring_worker import ScorerError, one_line

_T = TypeVar("_T")
_LOGGER = logging.getLogger("vlmrb_torchrl.scoring")
_TRIES = 2
"""How often a clip is asked about: once more, since its process may have died of something else."""
_LONGEST_ABSENCE_SECONDS = 5.0
"""Pause, at most, until a scorer that was unavailable is asked again."""
_JOIN_SECONDS = 5.0
"""How long `close` waits for the thread, which does not outlive the interpreter anyway."""


class Dispatcher:
    """A bounded queue of clips and the thread that has them scored in small batches.

    Nothing that a scorer does reaches the learner: faults are counted, logged once per kind, and
    answered by a pause that doubles from fault to fault until a batch succeeds. A call that hangs
    in the thread itself holds it for good; the learner's next `put` counts that as a fault.

    Args:
        buffer: Where scores are written: ``write_scores(index, generation, score)``.
        backend: Where the scorer runs.
        ledger: Where everything is counted.
        queue_clips: Clips that may wait; the oldest makes room.
        batch_clips: Clips scored at once, at most.
        max_wait_s: Seconds that a clip may wait for its batch to fill.
        duty_cycle: Share of the time that the scorer may compute.
        backoff_s: Pause after the first fault and the longest pause, in seconds.
        threaded: False to score in the thread that calls `put`, without pauses.

    Raises:
        ValueError: If one of the numbers is impossible.
    """

    def __init__(
        self,
        buffer: Any,
        backend: Backend,
        ledger: Ledger,
        *,
        queue_clips: int,
        batch_clips: int,
        max_wait_s: float,
        duty_cycle: float,
        backoff_s: tuple[float, float],
        threaded: bool,
    ) -> None:
        for name, value in (("queue_clips", queue_clips), ("batch_clips", batch_clips)):
            if not is_whole(value, 1):
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number >= 1.")
        if not is_real(max_wait_s, 0, MOST_SECONDS):
            raise ValueError(f"max_wait_s is {shown(max_wait_s)}; choose 0 or more seconds.")
        if not is_positive(duty_cycle, 1):
            raise ValueError(f"duty_cycle is {shown(duty_cycle)}; choose a share above 0, up to 1.")
        if not _are_pauses(backoff_s):
            raise ValueError(
                f"backoff_s is {shown(backoff_s)}; choose (shortest, longest) seconds."
            )
        self._buffer, self._backend, self._ledger = buffer, backend, ledger
        self._queue_clips, self._batch_clips = queue_clips, batch_clips
        self._max_wait_s, self._backoff_s = max_wait_s, backoff_s
        self._rest_per_second = 1 / duty_cycle - 1
        self._changed = threading.Condition()
        self._queue: deque[Ticket] = deque()
        self._batch: list[Ticket] = []  # being scored
        self._draining = 0
        self._closed = False
        self._silent = True  # no clip has a score, nor was that said
        self._faults_in_a_row = 0
        self._env_steps = 0
        self._pid = os.getpid()
        self._ready: bool | None = None  # None: it loads
        self._thread: threading.Thread | None = None
        if threaded:
            # Daemonic: what hangs in it must not keep the interpreter from ending.
            self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
            self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def put(self, clips: Sequence[Clip], env_steps: int, *, bounded: bool = True) -> None:
        """Queue ``clips``; ``env_steps`` transitions have been inserted until now.

        With ``bounded=False`` none is dropped: what a checkpoint held waits, all of it.
        """
        self._ledger.submitted(clips)
        if self._thread is None:
            self._env_steps = env_steps
            for start in range(0, len(clips), self._batch_clips):
                self._batch = [Ticket(clip) for clip in clips[start : start + self._batch_clips]]
                self._attempt(self._batch)
            return
        with self._changed:
            self._env_steps = env_steps
            waiting = len(self._queue)
            self._queue.extend(map(Ticket, clips))
            excess = len(self._queue) - self._queue_clips
            if clips and bounded and excess > 0:
                self._ledger.dropped([self._queue.popleft().clip for _ in range(excess)])
            # The thread sleeps until the first clip comes, then until a batch is full.
            if not waiting or waiting < self._batch_clips <= len(self._queue):
                self._changed.notify_all()
        self._watch()

    def _watch(self) -> None:
        """Count a call of the scorer that takes longer than it may; it cannot say so itself."""
        with self._changed:
            overdue = self._backend.overdue()
        if overdue:
            self._count("timeout", overdue, retried=False)

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait until the scorer has loaded, or failed to; whether it has."""
        if self._thread is None and not self._ready:
            self._start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready is not None or self._closed, timeout_s)
        self._watch()
        return self._ready is True

    def snapshot(self) -> tuple[list[Clip], dict[str, Any]]:
        """Clips neither scored nor given up, the oldest first, and the books of that moment."""
        with self._changed:
            pending = [ticket.clip for ticket in (*self._batch, *self._queue)]
            return pending, self._ledger.state_dict()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; whether that came true within ``timeout_s``."""
        with self._changed:
            self._draining += 1
            self._changed.notify_all()
            try:
                done = self._changed.wait_for(
                    lambda: self._closed or not (self._queue or self._batch), timeout_s
                )
            finally:
                self._draining -= 1
        self._watch()
        return done

    def close(self) -> None:
        """Stop, leaving what is pending unscored. May be called again."""
        if os.getpid() != self._pid:
            return  # a fork of the owner: nothing here is its own
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._ledger.dropped([ticket.clip for ticket in self._queue])
            self._queue.clear()
            self._changed.notify_all()
        self._backend.abort()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)
        with self._changed:
            self._ledger.dropped([ticket.clip for ticket in self._batch])
            self._batch = []

    def _start(self) -> None:
        """Let the scorer load; if it cannot, each batch tries again."""
        fault = None
        try:
            self._guarded(self._backend.start)
        except ScorerError as error:
            if self._closed:
                return
            fault = error
            self._count(fault.kind, str(fault), retried=False)
        with self._changed:
            self._ready = fault is None
            self._changed.notify_all()
        if fault is not None:
            self._pause(fault.kind)

    def _run(self) -> None:
        self._start()
        while batch := self._take():
            begun = time.monotonic()
            self._attempt(batch)
            rest_s = (time.monotonic() - begun) * self._rest_per_second
            if rest_s:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._draining, rest_s)

    def _take(self) -> list[Ticket]:
        """The next batch, as soon as there is one; none when closed."""
        with self._changed:
            while not self._closed:
                wait_s = None
                if self._queue:
                    wait_s = self._queue[0].queued_at + self._max_wait_s - time.monotonic()
                    if self._draining or len(self._queue) >= self._batch_clips or wait_s <= 0:
                        size = min(self._batch_clips, len(self._queue))
                        self._batch = [self._queue.popleft() for _ in range(size)]
                        return self._batch
                self._changed.wait(wait_s)
            return []

    def _attempt(self, batch: list[Ticket]) -> None:
        """Have a batch scored and the scores written; whatever goes wrong is counted.

        Clips that get no score are asked about once more: one by one if nothing tells which of
        them is to blame, so that none costs another its score.
        """
        parts, answered = deque([(batch, _TRIES)]), False
        while parts and not self._closed:
            part, tries = parts.popleft()
            answer, fault = self._score(part)
            if self._closed:
                return
            if fault is not None:
                # A server that is down says nothing of the batch: it waits.
                tries -= fault.kind != "unavailable" or self._thread is None
                self._count(fault.kind, str(fault), retried=tries > 0)
            none = np.isnan(answer)
            if not none.all():
                answered = self._ready = True
                self._silent, self._faults_in_a_row = False, 0
                self._write([part[i] for i in np.flatnonzero(~none)], answer[~none])
            if fault is None:
                continue
            left = [part[i] for i in np.flatnonzero(none)]
            if not tries:
                self._settle(left, self._ledger.failed)
                if self._silent:
                    self._silent = False
                    _LOGGER.warning(
                        "Scoring: no clip has a score yet, and the first were given up after two "
                        "tries. As long as that lasts, replay is what it is without a scorer."
                    )
            elif fault.scores is not None or fault.kind == "unavailable":
                parts.append((left, tries))
            else:
                parts.extend(([ticket], tries) for ticket in left)
            if not answered or fault.kind == "unavailable":
                self._pause(fault.kind)

    def _settle(self, tickets: list[Ticket], note: Callable[[list[Clip]], None]) -> None:
        """Enter the fate of clips into the books: they are pending until then, never both."""
        settled = set(tickets)
        with self._changed:
            if self._batch:  # else `close` has dropped it
                note([ticket.clip for ticket in tickets])
                self._batch = [ticket for ticket in self._batch if ticket not in settled]
                self._changed.notify_all()

    def _score(self, batch: list[Ticket]) -> tuple[NDArray[np.float32], ScorerError | None]:
        """Scores of a batch, NaN for none, and what was wrong if there is one."""
        clips = [ticket.clip for ticket in batch]
        try:
            return self._guarded(lambda: self._backend.score(stack_clips(clips))), None
        except ScorerError as fault:
            none = np.full(len(batch), np.nan, np.float32)
            return none if fault.scores is None else fault.scores, fault

    def _guarded(self, call: Callable[[], _T]) -> _T:
        """What ``call`` returns; whatever it raises becomes a `ScorerError`."""
        try:
            return call()
        except ScorerError:
            raise
        except BaseException as error:
            # Nothing else may end this thread; the learner's own is ended by Ctrl-C and exit.
            if self._thread is None and not isinstance(error, Exception):
                raise
            raise ScorerError("raised", one_line(error)) from error

    def _write(self, batch: list[Ticket], scores: NDArray[np.float32]) -> None:
        """Write the scores of clips to their transitions."""
        lengths = [len(ticket.clip) for ticket in batch]
        try:
            live = self._buffer.write_scores(
                torch.from_numpy(np.concatenate([ticket.clip.index for ticket in batch])),
                torch.from_numpy(np.concatenate([ticket.clip.generation for ticket in batch])),
                torch.from_numpy(scores.repeat(lengths)),
            )
        except Exception as error:
            self._count("write", one_line(error), retried=False)
            self._settle(batch, self._ledger.failed)
            self._pause("write")
            return
        written = [int(part.sum()) for part in live.cpu().split(lengths)]
        self._settle(
            batch, lambda _: self._ledger.answered(batch, scores, written, self._env_steps)
        )

    def _count(self, kind: str, message: str, retried: bool) -> None:
        """Count a fault, and log the first of its kind."""
        if self._ledger.fault(kind, retried):
            _LOGGER.warning(
                "Scoring: %s (%s). Learning goes on with the scores there are; further faults of "
                "this kind are only counted, as faults_%s of statistics().",
                message,
                kind,
                kind,
            )

    def _pause(self, kind: str) -> None:
        """Leave a scorer alone that has failed."""
        if self._thread is None:
            return
        first, longest = self._backoff_s
        if kind == "unavailable":  # meanwhile the queue fills
            longest = min(longest, _LONGEST_ABSENCE_SECONDS)
        pause_s = min(first * 2.0**self._faults_in_a_row, longest)
        self._faults_in_a_row = min(self._faults_in_a_row + 1, 30)
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause_s)


def _are_pauses(backoff_s: Any) -> bool:
    if not isinstance(backoff_s, (tuple, list)) or len(backoff_s) != 2:
        return False
    shortest, longest = backoff_s
    return is_real(shortest, 0, MOST_SECONDS) and is_real(longest, shortest, MOST_SECONDS)


def check_buffer(buffer: Any, clip_transitions: int) -> None:
    """Refuse a buffer that cannot take the scores of clips.

    Raises:
        TypeError: It, or its sampler, takes no scores.
        ValueError: It has other than flat slots, or fewer than a clip covers.
    """
    if not hasattr(buffer, "write_scores"):
        raise TypeError(f"buffer is {shown(buffer)}; scores go to a VLMReplayBuffer.")
    if not hasattr(buffer.sampler, "update_score"):
        raise TypeError(
            f"The buffer's {type(buffer.sampler).__name__} takes no scores; "
            "build the buffer with sampler=VLMPrioritizedSampler(capacity)."
        )
    storage = buffer.storage
    if not is_whole(clip_transitions, 1):
        raise ValueError(
            f"clip_transitions is {shown(clip_transitions)}; it must be a whole number >= 1."
        )
    if storage.ndim > 1:
        raise ValueError(
            f"The buffer's storage has {storage.ndim} dimensions; clips are cut from flat slots: "
            "leave ndim at 1 and insert data.reshape(-1)."
        )
    if clip_transitions > storage.max_size:
        raise ValueError(
            f"clip_transitions is {clip_transitions}, but the buffer holds {storage.max_size} "
            "transitions; choose shorter clips or a larger buffer."
        )
