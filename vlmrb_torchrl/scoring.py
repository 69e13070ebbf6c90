"""Scores what is inserted into a replay buffer while learning goes on."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import Compose, Transform

from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.checks import (
    MOST_SECONDS,
    checked_seconds,
    is_positive,
    is_real,
    is_whole,
    require,
    shown,
)
from vlmrb_torchrl.clips import Clip, ClipCutter, stack_clips
from vlmrb_torchrl.keys import CLIP, EVENTS, GENERATION, INDEX, RENDER_STATE
from vlmrb_torchrl.scorers.base import SeededScorer
from vlmrb_torchrl.scorers.local import LocalScorer
from vlmrb_torchrl.scoring_worker import (
    InPlaceWorker,
    ProcessWorker,
    ScorerError,
    described,
)

Mode = Literal["auto", "process", "thread", "sync"]


_LOGGER = logging.getLogger(__name__)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FATES = ("scored", "late", "dropped", "failed")
_FAULTS = ("raised", "invalid", "unavailable", "timeout", "died", "write")
_POSITIVE = 0.5
"""A score from here on counts as positive, as in the sampler's default threshold."""
_TRIES = 2
"""How often a clip is asked about: once more, since its process may have died of something else."""
_WINDOW_SECONDS = 30.0
"""Rates and latencies are those of the answers of this many last seconds."""
_LONGEST_ABSENCE_SECONDS = 5.0
"""Pause, at most, until a scorer that was unavailable is asked again."""
_END_SECONDS = 5.0
"""How long `close` waits for the thread, which does not outlive the interpreter anyway, and how
long a worker that does not start in time may take to end."""


class AsyncScorer:
    """Cuts insertions into clips, has them judged beside the learner, writes the scores back.

    `extend` inserts, copies what it needs and returns; it waits for no judge and no fault of one
    reaches it. A clip of which every slot was overwritten meanwhile is dropped by the buffer's
    generations: no score lands on another transition.

    | mode | the scorer runs | for |
    |---|---|---|
    | ``"process"`` | in a process of its own, at low priority | models, on the CPU or a GPU |
    | ``"thread"`` | in a thread, on CUDA in its own stream | cheap scorers, notebooks |
    | ``"sync"`` | inside `extend`, before it returns | tests and bit-exact reruns |
    | ``"auto"`` | a thread if ``scorer.cheap``, else a process (`choose_mode` says why) | |

    A fault of the scorer is counted, logged once per kind, and followed by a pause that doubles
    from fault to fault. Its clips are asked about once more, one by one, then given up; one that is
    answered NaN, or a number outside [0, 1], costs the others nothing. A process that hangs or dies
    is replaced. A thread cannot be: one that is late is counted as a fault and its answer still
    taken; one that never comes back scores nothing more, and the queue drops what it cannot hold.
    After `ScorerUnavailableError` (a server is down) the same batch is asked about until it is
    answered; in ``"sync"`` mode, where learning would wait, once more.

    Args:
        buffer: Where the transitions are and the scores go. Its sampler must take scores.
        transform: Draws ``"clip"`` from ``"render_state"``; None for a scorer of events.
        scorer: The judge, any TensorDictModule that writes ``"score"`` ``[B]`` in [0, 1], or NaN
            where a clip has none.
        clip_transitions: Transitions that a clip covers.
        frames_per_clip: Frames of them that are shown, the last outcome always among them.
        stride: Transitions from one clip's start to the next; None: no overlap.
        queue_clips: Clips that may wait. When the queue is full the oldest makes room.
        delay_env_steps: Control of an experiment: transitions inserted after a clip's end until it
            is queued, in every mode; its score comes that much later than it would.
        dropped_share: Control of an experiment: share of the clips, chosen by ``seed``, that are
            dropped as if the queue had been full.
        batch_clips: Clips scored at once, at most.
        max_wait_s: Seconds that a clip may wait for its batch to fill.
        mode: See above.
        timeout_s: Seconds for a batch until the scorer counts as hanging. In ``"sync"`` mode
            there is no limit.
        start_timeout_s: Seconds for the scorer to start and load, and again for its first batch,
            in which it may compile.
        duty_cycle: Share of the time that the scorer may compute, in (0, 1]; after a batch it
            rests. For a scorer on the learner's own GPU: from a process the two take turns there;
            of a thread's stream (of priority 0) only new work lets the learner's go first
            (``torch.cuda.Stream(priority=-1)``).
        backoff_s: Shortest and longest pause after a fault, in seconds.
        niceness: Of the worker process, 0 (as important as the learner) to 19.
        worker_threads: Threads that torch may use in the worker process.
        patience: Insertions after which an unseen trajectory counts as given up; more than there
            are asynchronous workers.
        seed: Chooses the random clips of `showcase`, and those that are dropped.

    Raises:
        TypeError: If the buffer or its sampler cannot take scores, or the scorer is none.
        ValueError: If the numbers are impossible, transform or scorer read what no clip holds, or
            the scorer cannot be sent to a process.

    Example:
        >>> scoring = AsyncScorer(buffer, ClipRenderTransform(renderer), scorer)
        >>> with scoring:
        ...     for data in collector:
        ...         scoring.extend(data)

        A collector of this process inserts by itself, also in its background thread, if it is
        given the scorer for its buffer (a multi-process collector cannot: let it yield data):

        >>> collector = Collector(env, policy, frames_per_batch=256, replay_buffer=scoring)
        >>> for _ in collector:  # None
        ...     batch = buffer.sample()
    """

    def __init__(
        self,
        buffer: VLMReplayBuffer,
        transform: Transform | None,
        scorer: TensorDictModuleBase,
        *,
        clip_transitions: int = 32,
        frames_per_clip: int = 32,
        stride: int | None = None,
        queue_clips: int = 256,
        delay_env_steps: int = 0,
        dropped_share: float = 0.0,
        batch_clips: int = 16,
        max_wait_s: float = 0.1,
        duty_cycle: float = 1.0,
        mode: Mode = "auto",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
        backoff_s: tuple[float, float] = (0.5, 60.0),
        niceness: int = 5,
        worker_threads: int = 1,
        patience: int = 8,
        seed: int = 0,
    ) -> None:
        _check_parts(buffer, transform, scorer)
        whole = {
            "queue_clips": queue_clips,
            "batch_clips": batch_clips,
            "worker_threads": worker_threads,
        }
        for name, number in whole.items():
            require(is_whole(number, 1), name, number, "use a whole number from 1 on")
        for name, seconds in {"timeout_s": timeout_s, "start_timeout_s": start_timeout_s}.items():
            remedy = f"use a number above 0, up to {MOST_SECONDS:g}"
            require(is_positive(seconds, MOST_SECONDS), name, seconds, remedy)
        require(is_real(max_wait_s, 0, MOST_SECONDS), "max_wait_s", max_wait_s, "use 0 or more")
        require(is_positive(duty_cycle, 1), "duty_cycle", duty_cycle, "use above 0, up to 1")
        pair = isinstance(backoff_s, (tuple, list)) and len(backoff_s) == 2
        pauses = pair and all(is_real(pause, 0, MOST_SECONDS) for pause in backoff_s)
        rising = pauses and backoff_s[0] <= backoff_s[1]
        require(rising, "backoff_s", backoff_s, "use (shortest, longest) seconds")
        require(is_whole(niceness, 0, 19), "niceness", niceness, "use 0 (as the learner) to 19")
        for name, number in {"seed": seed, "delay_env_steps": delay_env_steps}.items():
            require(is_whole(number, 0), name, number, "use a whole number from 0 on")
        require(is_real(dropped_share, 0, 1), "dropped_share", dropped_share, "use 0 to 1")
        self._buffer, self._transform, self._scorer = buffer, transform, scorer
        self._cutter = ClipCutter(
            clip_transitions,
            frames_per_clip,
            stride,
            needs={EVENTS if key == EVENTS else RENDER_STATE for key in scorer.in_keys},
            patience=patience,
        )
        slots = buffer.storage.max_size
        remedy = f"use at most {slots}, which the buffer holds"
        require(clip_transitions <= slots, "clip_transitions", clip_transitions, remedy)
        self._cutting = threading.Lock()
        self._blind = False  # pictures to look at failed
        self.mode = choose_mode(mode, scorer)
        drawn = transform if CLIP in scorer.in_keys else None
        limits = timeout_s, start_timeout_s
        self._worker: InPlaceWorker | ProcessWorker
        if self.mode == "process":
            self._worker = ProcessWorker(drawn, scorer, *limits, niceness, worker_threads)
        else:
            self._worker = InPlaceWorker(drawn, scorer, *limits, self.mode == "thread")
        waits = queue_clips, batch_clips, max_wait_s, duty_cycle, backoff_s
        lacks = delay_env_steps, dropped_share, seed
        self._queue = _Queue(buffer, self._worker, _Counts(seed), *waits, *lacks)
        if self.mode != "sync":
            self._queue.start()
        # Runs when this object is collected and when the interpreter ends, Ctrl-C included.
        self._finalizer = weakref.finalize(self, self._queue.close)

    def extend(
        self, data: TensorDictBase, stored: TensorDictBase | None = None, *, source: int = 0
    ) -> Tensor:
        """Insert transitions into the buffer and take them in, under one lock.

        What the buffer's transforms leave of them is what is stored, cut and judged: after
        `MultiStepTransform` a clip shows where its n-step transitions lead, and the last n wait
        for the next call.

        Args:
            data: The transitions, ``[T]``, or ``[..., T]``, one environment a row, with
                ``("next", "done")``, ``("next", "render_state")`` where frames are wanted,
                ``("next", "events")`` where the scorer reads them, and, if they are known,
                ``"render_state"`` and the collector's trajectory ids, which tell what follows on
                what. It is copied. What lies on a GPU is waited for: collect to the CPU.
            stored: What the buffer keeps of them, of the same shape, where that is not all of
                ``data``: render states need not lie in the buffer. For a buffer without transforms
                that change the rows.
            source: Which of several collectors wrote ``data``; each counts trajectories from 0.

        Returns:
            Their slots, int64, as many as there were transitions to store.

        Raises:
            KeyError: If a key is missing.
            TypeError: If data is no TensorDict.
            ValueError: If data is empty, ``stored`` is of another shape, or source no whole number.
            RuntimeError: If this scorer is closed.
        """
        self._check(data, source)
        fits = isinstance(stored, TensorDictBase) and stored.shape == data.shape
        require(stored is None or fits, "stored", stored, f"pass a TensorDict {list(data.shape)}")
        with self._cutting:
            written = self._buffer.insert(data if stored is None else stored)
            if written is None:
                return torch.zeros(0, dtype=torch.int64)
            index: Tensor = written[INDEX].reshape(-1)
            read = written if stored is None else data
            self._take(read, index, written[GENERATION].reshape(-1), source)
        return index

    @property
    def write_count(self) -> int:
        """Transitions inserted so far. A collector that has this object for its buffer asks."""
        count: int = self._buffer.write_count
        return count

    def submit(self, data: TensorDictBase, index: Tensor, *, source: int = 0) -> None:
        """Take in what was just inserted, ``index = buffer.extend(data)``, by oneself.

        Args:
            data: The transitions, as of `extend`; ``[..., T]`` if ``data.reshape(-1)`` was
                inserted.
            index: The slots that ``buffer.extend`` returned.
            source: As of `extend`.

        Raises:
            TypeError: If index is no tensor; else as `extend`.
            ValueError: If index and data differ in length, index names what is no slot, or the
                buffer's transforms may have stored other rows than ``data`` has.
        """
        self._check(data, source)
        if not isinstance(index, Tensor) or index.dtype not in _WHOLE:
            raise TypeError(f"index is {shown(index)}; pass the slots that extend returned.")
        slots = self._buffer.storage.max_size
        outside = index[(index < -1) | (index >= slots)].tolist()
        remedy = f"pass the slots that extend returned, of {slots}"
        require(not outside, "index", outside, remedy)
        index = index.detach().reshape(-1).to("cpu", torch.int64)
        generation = self._stamps(data, index)
        with self._cutting:
            self._take(data, index, generation, source)

    def _check(self, data: TensorDictBase, source: int) -> None:
        self._cutter.check(data)
        require(is_whole(source, 0), "source", source, "number the collectors 0, 1, …")
        if self._queue.closed:
            raise RuntimeError("This AsyncScorer is closed; make a new one.")

    def _take(self, data: TensorDictBase, index: Tensor, generation: Tensor, source: int) -> None:
        clips = self._cutter.cut(data, index, generation, source)
        self._queue.put(clips, self._cutter.transitions)

    def _stamps(self, data: TensorDictBase, index: Tensor) -> Tensor:
        """The slots' generations at this insertion, of the shape of ``index``."""
        written: Tensor | None = data.get(INDEX, None)
        stamps: Tensor | None = data.get(GENERATION, None)
        if stamps is not None and written is not None:
            written = written.reshape(-1).to("cpu", torch.int64)  # a GPU's data, the CPU's slots
            if torch.equal(written, index):
                return stamps  # taken under the lock of the very write
        if len(self._buffer.transform):
            raise ValueError(
                f"index holds {len(index)} slots, but the buffer's transforms may have stored "
                "other rows than data has: let AsyncScorer.extend insert data."
            )
        stamps = self._buffer.generations_of(index)
        overwritten = len(index) - self._buffer.storage.max_size
        if overwritten > 0:  # the batch overwrote its own start; no slot has a stamp of -1
            stamps = stamps.clone()
            stamps[:overwritten] = -1
        return stamps

    def flush(self) -> None:
        """Queue every open clip as it is. For when the environments start afresh."""
        with self._cutting:
            self._queue.put(self._cutter.flush(), self._cutter.transitions)

    def wait_until_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until the scorer has loaded, or failed to; in ``"sync"`` mode, let it load.

        A process takes seconds to start. Learning need not wait for it, but what is inserted
        meanwhile may be more than the queue holds.

        Args:
            timeout_s: Seconds to wait at most; None: as long as it may take to start.

        Returns:
            Whether it has loaded. If it failed to, a warning has said why, and each batch has it
            try again.
        """
        if timeout_s is None:
            timeout_s = self._worker.start_timeout_s + _END_SECONDS
        return self._queue.wait_until_ready(checked_seconds(timeout_s))

    def drain(self, timeout_s: float = 60.0, *, flush: bool = False) -> bool:
        """Wait until every queued clip is scored or given up.

        Those that ``delay_env_steps`` holds back are not queued yet.

        Args:
            timeout_s: Seconds to wait at most.
            flush: Queue the open clips first.

        Returns:
            Whether none is left.
        """
        timeout_s = checked_seconds(timeout_s)
        if flush:
            self.flush()
        return self._queue.drain(timeout_s)

    def statistics(self) -> dict[str, float]:
        """What became of the clips and how fast, for logging.

        ``clips_submitted = clips_scored + clips_late + clips_dropped + clips_failed +
        clips_pending``, and the same in ``transitions_…`` covered; ``clips_positive`` (score
        from 0.5 on); ``faults_{raised, invalid, unavailable, timeout, died, write}``; ``retries``;
        and of the last 30 seconds ``clips_per_s``, ``latency_s`` and ``latency_env_steps``: from
        the end of a clip to its score in the buffer, the latter in transitions inserted meanwhile.
        ``transitions_open`` are those whose clip is not complete.
        """
        with self._cutting, self._queue.changed:
            figures = self._queue.counts.statistics(self._queue.pending())
            return {**figures, "transitions_open": float(len(self._cutter))}

    def showcase(self) -> dict[str, tuple[Tensor, float]]:
        """Clips to look at: the best-scored and a random one of those since the last call.

        Returns:
            ``"best"`` and ``"random"`` to (frames uint8 ``[F, 3, H, W]``, score); empty without
            a transform, if nothing was scored since, or if they cannot be drawn: that is logged
            once, and not tried again.
        """
        with self._queue.changed:
            shown = self._queue.counts.pop_shown()
        if self._transform is None or self._blind:
            return {}
        try:
            return {
                name: (self._transform(stack_clips([clip]))[CLIP][0].cpu(), score)
                for name, (clip, score) in shown.items()
                if clip.render_state is not None
            }
        except Exception as error:
            self._blind = True
            _LOGGER.warning("No clips will be shown: %s", described(error))
            return {}

    def state_dict(self) -> dict[str, Any]:
        """Pending and open clips, counts and random states, as tensors and numbers.

        Take it before the buffer's: what is judged in between then has its score in the buffer
        and is judged once more; the other way round its score would be lost.
        """
        with self._cutting:
            with self._queue.changed:
                pending, counts = self._queue.pending(), dict(self._queue.counts.count)
            return {
                **self._state_of_parts(),
                "pending": [clip.state_dict() for clip in pending],
                "counts": counts,
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, once the buffer has been restored to the same moment.

        What is pending is queued again. The open clips wait for environments that go on with the
        same trajectory ids; where they start afresh, call `flush` next.

        Raises:
            ValueError: If ``state`` is none that `state_dict` returned; nothing has changed then.
        """
        with self._cutting:
            before = self._state_of_parts()
            try:
                pending = [Clip.from_state_dict(clip) for clip in state["pending"]]
                _check_slots(pending, self._buffer.storage.max_size)
                self._load_parts(state)
                with self._queue.changed:
                    self._queue.counts.load(state["counts"])
            except Exception as error:  # whatever a damaged state makes its reader say
                self._load_parts(before)
                raise ValueError(
                    "state must be one that AsyncScorer.state_dict returned for the same scorer "
                    f"and buffer, got {shown(state)}: {type(error).__name__}: {shown(error)}"
                ) from error
            self._queue.put(pending, self._cutter.transitions, bounded=False)

    def _state_of_parts(self) -> dict[str, Any]:
        return {
            "cutter": self._cutter.state_dict(),
            "scorer": {name: module.get_extra_state() for name, module in self._each(SeededScorer)},
            "kept": {name: module.kept_state() for name, module in self._each(LocalScorer)},
        }

    def _load_parts(self, state: dict[str, Any]) -> None:
        self._cutter.load_state_dict(state["cutter"])
        for name, module in self._each(SeededScorer):
            module.set_extra_state(state["scorer"][name])
        for name, module in self._each(LocalScorer):
            module.load_kept_state(state["kept"][name])

    def _each(self, kind: type) -> list[tuple[str, Any]]:
        modules = self._scorer.named_modules()
        # Bit by bit the same scores are the "sync" mode's promise; elsewhere a LocalScorer's state
        # is weight only. A worker process has its own copy of a SeededScorer, from the seed on.
        wanted = kind is SeededScorer or self.mode == "sync"
        return [(name, module) for name, module in modules if wanted and isinstance(module, kind)]

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None in other modes, and while there is none."""
        return self._worker.pid

    def close(self) -> None:
        """End the worker, leaving what is pending unscored. May be called again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(eq=False)
class _Queue:
    """The clips that wait, and the thread that has them scored in small batches.

    It knows nothing of the `AsyncScorer`, which may be collected while the thread runs. Nothing
    that a scorer does reaches the learner. A call that hangs in the thread itself holds it for
    good; the learner's next `put` counts that as a fault. Without `start` clips are scored by
    `put`, without pauses.
    """

    buffer: VLMReplayBuffer
    worker: InPlaceWorker | ProcessWorker
    counts: _Counts
    queue_clips: int
    batch_clips: int
    max_wait_s: float
    duty_cycle: float
    backoff_s: tuple[float, float]
    delay_env_steps: int
    dropped_share: float
    seed: int

    def __post_init__(self) -> None:
        self.closed = False
        self.changed = threading.Condition()  # its lock is that of the counts, too
        self._delayed: deque[Clip] = deque()
        self._waiting: deque[Clip] = deque()
        self._batch: list[Clip] = []  # being scored
        self._draining = 0
        self._ready: bool | None = None  # None: it loads
        self._silent = True  # no clip has a score, nor was that said
        self._warned: set[str] = set()  # kinds of faults, those of a loaded state not among them
        self._faults_in_a_row = 0
        self._env_steps = 0
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; what hangs in it must not keep the interpreter from ending."""
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ the learner's side

    def put(self, clips: Sequence[Clip], env_steps: int, *, bounded: bool = True) -> None:
        """Queue ``clips``; ``env_steps`` transitions have been inserted until now.

        The oldest make room. With ``bounded=False`` none is dropped: what a checkpoint held waits,
        all of it, in the place of what was held back here.
        """
        with self.changed:
            if self.closed:
                self.counts.add("dropped", clips)
                return
            self._env_steps = env_steps
            if not bounded:
                self._delayed.clear()
            for clip in clips:
                clip.queued_at = time.monotonic()
                if self._is_dropped(clip):
                    self.counts.add("dropped", [clip])
                else:
                    self._delayed.append(clip)
            before = len(self._waiting)
            while self._delayed and env_steps - self._delayed[0].cut_at >= self.delay_env_steps:
                self._waiting.append(self._delayed.popleft())
            excess = len(self._waiting) - self.queue_clips
            if self._thread is not None and len(self._waiting) > before and bounded and excess > 0:
                self.counts.add("dropped", [self._waiting.popleft() for _ in range(excess)])
            # The thread sleeps until the first clip comes, then until a batch is full.
            if not before or before < self.batch_clips <= len(self._waiting):
                self.changed.notify_all()
        while self._thread is None and self._waiting:
            self._attempt(self._next())
        self._watch()

    def _is_dropped(self, clip: Clip) -> bool:
        """Whether the toss that belongs to this clip, also in a run that is resumed, drops it."""
        toss = random.Random(f"{self.seed} {clip.cut_at} {clip.index[0]}")
        return toss.random() < self.dropped_share

    def _watch(self) -> None:
        """Count a call of the scorer that takes longer than it may; it cannot say so itself."""
        with self.changed:
            overdue = self.worker.overdue()
        if overdue:
            self._fault("timeout", overdue)

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait until the scorer has loaded, or failed to; whether it has."""
        if self._thread is None and not self._ready:
            self._load()
        with self.changed:
            self.changed.wait_for(lambda: self._ready is not None or self.closed, timeout_s)
        self._watch()
        return self._ready is True

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; whether that came true within ``timeout_s``."""
        with self.changed:
            self._draining += 1
            self.changed.notify_all()
            try:
                done = self.changed.wait_for(
                    lambda: self.closed or not (self._waiting or self._batch), timeout_s
                )
            finally:
                self._draining -= 1
        self._watch()
        return done

    def pending(self) -> list[Clip]:
        """Clips neither scored nor given up, the oldest first; call it under the lock."""
        return [*self._batch, *self._waiting, *self._delayed]

    def close(self) -> None:
        """Stop, leaving what is pending unscored. May be called again."""
        if os.getpid() != self._pid:
            return  # a fork of the owner: nothing here is its own
        with self.changed:
            if self.closed:
                return
            self.closed = True
            for clips in (self._waiting, self._delayed):
                self.counts.add("dropped", clips)
                clips.clear()
            self.changed.notify_all()
        self.worker.abort()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_END_SECONDS)
        with self.changed:
            self.counts.add("dropped", self._batch)
            self._batch = []

    # ------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        self._load()
        while batch := self._next():
            begun = time.monotonic()
            self._attempt(batch)
            rest_s = (time.monotonic() - begun) * (1 / self.duty_cycle - 1)
            if rest_s:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or self._draining, rest_s)

    def _load(self) -> None:
        """Let the scorer load; if it cannot, each batch tries again."""
        _, fault = self._asked(self.worker.start)
        if self.closed:
            return
        if fault is not None:
            self._fault(fault.kind, str(fault))
        with self.changed:
            self._ready = fault is None
            self.changed.notify_all()
        if fault is not None:
            self._pause(fault.kind)

    def _next(self) -> list[Clip]:
        """The next batch, as soon as there is one; none when closed."""
        with self.changed:
            while not self.closed:
                wait_s = None
                if self._waiting:
                    wait_s = self._waiting[0].queued_at + self.max_wait_s - time.monotonic()
                    full = len(self._waiting) >= self.batch_clips
                    if full or wait_s <= 0 or self._draining or self._thread is None:
                        size = min(self.batch_clips, len(self._waiting))
                        self._batch = [self._waiting.popleft() for _ in range(size)]
                        return self._batch
                self.changed.wait(wait_s)
            return []

    def _attempt(self, batch: list[Clip]) -> None:
        """Have a batch scored and the scores written; whatever goes wrong is counted.

        Clips that get no score are asked about once more: one by one if nothing tells which of
        them is to blame, so that none costs another its score.
        """
        parts, answered = deque([(batch, _TRIES)]), False
        while parts and not self.closed:
            part, tries = parts.popleft()
            answer, fault = self._asked(self._score, part)
            if self.closed:
                return
            if fault is not None:
                # A server that is down says nothing of the batch: it waits.
                tries -= fault.kind != "unavailable" or self._thread is None
                self._fault(fault.kind, str(fault), retried=tries > 0)
            if answer is None:
                answer = np.full(len(part), np.nan, np.float32)
            none = np.isnan(answer)
            if not none.all():
                answered = self._ready = True
                self._silent, self._faults_in_a_row = False, 0
                self._write([part[i] for i in np.flatnonzero(~none)], answer[~none])
            if fault is None:
                continue
            left = [part[i] for i in np.flatnonzero(none)]
            if not tries:
                self._give_up(left)
                if self._silent:
                    self._silent = False
                    _LOGGER.warning(
                        "Scoring: no clip has a score yet, and the first were given up after two "
                        "tries. As long as that lasts, replay is what it is without a scorer."
                    )
            elif fault.scores is not None or fault.kind == "unavailable":
                parts.append((left, tries))
            else:
                parts.extend(([clip], tries) for clip in left)
            if not answered or fault.kind == "unavailable":
                self._pause(fault.kind)

    def _score(self, clips: list[Clip]) -> NDArray[np.float32]:
        return self.worker.score(stack_clips(clips))

    def _asked(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, ScorerError | None]:
        """What ``call`` returns, and what was wrong with it if something was."""
        try:
            return call(*arguments), None
        except ScorerError as fault:
            return fault.scores, fault
        except BaseException as error:
            # Nothing else may end this thread; the learner's own is ended by Ctrl-C and exit.
            if self._thread is None and not isinstance(error, Exception):
                raise
            return None, ScorerError("raised", described(error))

    def _write(self, clips: list[Clip], scores: NDArray[np.float32]) -> None:
        """Write the scores of clips to their transitions."""
        lengths = [len(clip) for clip in clips]
        try:
            live = self.buffer.write_scores(
                torch.from_numpy(np.concatenate([clip.index for clip in clips])),
                torch.from_numpy(np.concatenate([clip.generation for clip in clips])),
                torch.from_numpy(scores.repeat(lengths)),
            )
        except Exception as error:
            self._fault("write", described(error))
            self._give_up(clips)
            self._pause("write")
            return
        written = [int(part.sum()) for part in live.cpu().split(lengths)]
        answers = clips, scores.tolist(), written, self._env_steps
        self._settle(clips, lambda: self.counts.answered(*answers))

    def _give_up(self, clips: list[Clip]) -> None:
        self._settle(clips, lambda: self.counts.add("failed", clips))

    def _settle(self, clips: list[Clip], count: Callable[[], None]) -> None:
        """Count the fate of clips: they are pending until then, never both."""
        with self.changed:
            if self._batch:  # else `close` has dropped it
                count()
                settled = set(clips)
                self._batch = [clip for clip in self._batch if clip not in settled]
                self.changed.notify_all()

    def _fault(self, kind: str, message: str, retried: bool = False) -> None:
        """Count a fault, and log the first of its kind."""
        with self.changed:
            self.counts.count[f"faults_{kind}"] += 1
            self.counts.count["retries"] += retried
            first = kind not in self._warned
            self._warned.add(kind)
        if first:
            _LOGGER.warning(
                "Scoring: %s (%s). Learning goes on with the scores there are; further faults of "
                "this kind are only counted, as faults_%s of statistics().",
                message,
                kind,
                kind,
            )

    def _pause(self, kind: str) -> None:
        """Leave a scorer alone that has failed; the pause doubles from fault to fault."""
        if self._thread is None:
            return
        first, longest = self.backoff_s
        if kind == "unavailable":  # meanwhile the queue fills
            longest = min(longest, _LONGEST_ABSENCE_SECONDS)
        pause_s = min(first * 2.0**self._faults_in_a_row, longest)
        self._faults_in_a_row = min(self._faults_in_a_row + 1, 30)
        with self.changed:
            self.changed.wait_for(lambda: self.closed, pause_s)


class _Counts:
    """What became of every clip and of the transitions in it, how fast, and which to show.

    A clip is scored, late (each of its slots was overwritten before), dropped (the queue was full,
    or ``dropped_share``), failed (the scorer gave no score) or pending. A transition in two clips
    counts twice. Whoever calls holds the queue's lock.
    """

    def __init__(self, seed: int) -> None:
        fates = [f"{unit}_{fate}" for unit in ("clips", "transitions") for fate in _FATES]
        faults = [f"faults_{kind}" for kind in _FAULTS]
        self.count = dict.fromkeys((*fates, *faults, "clips_positive", "retries"), 0)
        # Of each batch answered: when, clips, their summed latencies in seconds and in env steps.
        self._recent: deque[tuple[float, int, float, int]] = deque()
        self._started = time.monotonic()
        self._random = random.Random(seed)
        self._shown: dict[str, tuple[Clip, float]] = {}
        self._since_shown = 0

    def add(self, fate: str, clips: Collection[Clip]) -> None:
        """Count clips and all of their transitions."""
        self.count[f"clips_{fate}"] += len(clips)
        self.count[f"transitions_{fate}"] += sum(map(len, clips))

    def answered(
        self, clips: list[Clip], scores: list[float], written: list[int], env_steps: int
    ) -> None:
        """Count scores, of each clip to the ``written`` transitions that were still there."""
        now = time.monotonic()
        for clip, score, live in zip(clips, scores, written, strict=True):
            self.count["clips_scored" if live else "clips_late"] += 1
            self.count["transitions_scored"] += live
            self.count["transitions_late"] += len(clip) - live
            self.count["clips_positive"] += score >= _POSITIVE
            self._since_shown += 1
            if "best" not in self._shown or score > self._shown["best"][1]:
                self._shown["best"] = clip, score
            if self._random.randrange(self._since_shown) == 0:  # each equally likely
                self._shown["random"] = clip, score
        seconds = sum(now - clip.queued_at for clip in clips)
        steps = sum(env_steps - clip.cut_at for clip in clips)
        self._recent.append((now, len(clips), seconds, steps))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.popleft()

    def statistics(self, pending: list[Clip]) -> dict[str, float]:
        """As `AsyncScorer.statistics`."""
        now = time.monotonic()
        self._forget(now)
        figures = {name: float(count) for name, count in self.count.items()}
        for unit, waiting in (("clips", len(pending)), ("transitions", sum(map(len, pending)))):
            done = sum(figures[f"{unit}_{fate}"] for fate in _FATES)
            figures |= {f"{unit}_pending": waiting, f"{unit}_submitted": done + waiting}
        clips = sum(answer[1] for answer in self._recent)
        return figures | {
            "clips_per_s": clips / max(min(_WINDOW_SECONDS, now - self._started), 1e-9),
            "latency_s": sum(answer[2] for answer in self._recent) / max(clips, 1),
            "latency_env_steps": sum(answer[3] for answer in self._recent) / max(clips, 1),
        }

    def pop_shown(self) -> dict[str, tuple[Clip, float]]:
        """The best-scored and a random clip of those answered since the last call."""
        shown, self._shown, self._since_shown = self._shown, {}, 0
        return shown

    def load(self, count: dict[str, int]) -> None:
        """Go on counting; what was pending counts once it is queued again."""
        whole = all(is_whole(number, 0) for number in count.values())
        remedy = "use whole numbers, one of each kind"
        require(whole and count.keys() == self.count.keys(), "counts", count, remedy)
        self.count = dict(count)


# ---------------------------------------------------------------- the boundary


def choose_mode(mode: str, scorer: TensorDictModuleBase) -> str:
    """The mode that ``"auto"`` stands for, else ``mode`` itself.

    A scorer that is cheap costs less than the way to a process. Any other would take the
    interpreter lock from the learner: a process takes it for 0.4 ms a batch (of 16 DoorKey clips).

    That holds on CUDA, too. Measured, on an H200 and with the learner on the CPU: beside a judge
    in a thread, 33 clips/s, the learner kept 0.75 of its speed, while the GPU stood three quarters
    idle. Not measured: the same judge in a process; nor one on the learner's own GPU, where the
    kernels of two processes take turns, while those of a thread's stream may run together.
    ``python -m recipes.benchmarks.scoring --training_pairs`` compares all four.
    """
    modes = get_args(Mode)
    require(isinstance(mode, str) and mode in modes, "mode", mode, f"use one of {modes}")
    if mode != "auto":
        return mode
    cheap = getattr(scorer, "cheap", False)
    return "thread" if cheap or os.name != "posix" else "process"


def _check_parts(buffer: Any, transform: Any, scorer: Any) -> None:
    """Refuse what cannot take scores, draw or judge, or reads what no clip holds."""
    if not isinstance(scorer, TensorDictModuleBase):
        raise TypeError(
            f"scorer is {shown(scorer)}; pass a ClipScorer or another TensorDictModule."
        )
    if transform is not None and not isinstance(transform, Transform):
        raise TypeError(f"transform is {shown(transform)}; pass ClipRenderTransform(renderer).")
    if not hasattr(buffer, "write_scores"):
        raise TypeError(f"buffer is {shown(buffer)}; scores go to a VLMReplayBuffer.")
    if not hasattr(buffer.sampler, "update_score"):
        raise TypeError(
            f"The buffer's {type(buffer.sampler).__name__} takes no scores; "
            "build the buffer with sampler=VLMPrioritizedSampler(capacity)."
        )
    if buffer.storage.ndim > 1:
        raise ValueError(
            f"The buffer's storage has {buffer.storage.ndim} dimensions; clips are cut from flat "
            "slots: leave ndim at 1 and insert data.reshape(-1)."
        )
    if CLIP in scorer.in_keys and transform is None:
        raise ValueError(f"{scorer!r} reads frames; pass ClipRenderTransform(renderer).")
    steps = [] if transform is None else list(transform.modules())
    held = {RENDER_STATE, EVENTS}
    for part in steps:
        if isinstance(part, Transform) and not isinstance(part, Compose):
            _check_keys("transform", part, held)
            # One that does not say what it writes may write anything.
            held.update(part.out_keys or scorer.in_keys)
    # For a scorer that reads no frames nothing is drawn.
    _check_keys("scorer", scorer, held if CLIP in scorer.in_keys else {RENDER_STATE, EVENTS})


def _check_keys(name: str, part: Any, held: set[Any]) -> None:
    missing = [key for key in part.in_keys if key not in held]
    remedy = f"clips hold {sorted(held)}: build ClipRenderTransform(renderer) with its own keys."
    if missing:
        raise ValueError(f"{name} reads {missing}, but {remedy}")


def _check_slots(clips: list[Clip], capacity: int) -> None:
    """Refuse clips of a state whose transitions cannot lie in a buffer of ``capacity`` slots."""
    for clip in clips:
        index, generation = clip.index, clip.generation
        alike = index.dtype == generation.dtype == np.int64 and index.shape == generation.shape
        inside = alike and bool(((index >= -1) & (index < capacity)).all())
        require(inside, "a clip's slots", index, f"use int64 below {capacity}, a stamp for each")
