"""Scores what is inserted into a replay buffer while learning goes on."""

from __future__ import annotations

import logging
import threading
import weakref
from types import TracebackType
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import Transform

from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.checks import checked_seconds, is_whole, shown
from vlmrb_torchrl.clips import Clip, check_clip_keys, check_slots, stack_clips
from vlmrb_torchrl.cutting import ClipCutter
from vlmrb_torchrl.insertions import check_index
from vlmrb_torchrl.keys import CLIP, EVENTS, GENERATION, INDEX, RENDER_STATE
from vlmrb_torchrl.scorers.base import SeededScorer
from vlmrb_torchrl.scorers.local import LocalScorer
from vlmrb_torchrl.scoring_backends import Mode, check_scorer, choose_mode
from vlmrb_torchrl.scoring_dispatcher import Dispatcher, check_buffer
from vlmrb_torchrl.scoring_ledger import Ledger
from vlmrb_torchrl.scoring_process import ProcessBackend, make_backend

_LOGGER = logging.getLogger(__name__)
_END_SECONDS = 5.0
"""How long a worker that does not start in time may take to end."""


class AsyncScorer:
    """Cuts insertions into clips, has them judged beside the learner, writes the scores back.

    `extend` inserts, copies what it needs and returns; it waits for no judge and no fault of one
    reaches it. A clip of which every slot was overwritten meanwhile is dropped by the buffer's
    generations: no score lands on another transition.

    | mode | the scorer runs | for |
    |---|---|---|
    | ``"process"`` | in a process of its own, at low priority | scorers that compute on the CPU |
    | ``"thread"`` | in a thread, on CUDA in its own stream | scorers on a GPU |
    | ``"sync"`` | inside `extend`, before it returns | tests and bit-exact reruns |
    | ``"auto"`` | thread if it is on CUDA or ``scorer.cheap``, else process | |

    A scorer that raises, answers nonsense, hangs or dies is counted, logged once per kind, and
    asked once more about the same clips, one by one, after a pause that doubles from fault to
    fault; then those without a score are given up. A clip that it answers NaN or another number
    outside [0, 1] costs the others nothing: it alone is asked about once more. A process that
    hangs or dies is replaced; a thread cannot be: one that is late is counted as a fault and its
    answer still taken, one that never comes back scores nothing more, and the queue drops what it
    cannot hold. A scorer that raises `ScorerUnavailableError` (its server is down) is asked about
    the same batch until it answers; in ``"sync"`` mode, where learning would wait, once more.

    Args:
        buffer: Where the transitions are and the scores go. Its sampler must take scores.
        transform: Draws ``"clip"`` from ``"render_state"``; None for a scorer of events.
        scorer: The judge, any TensorDictModule that writes ``"score"`` ``[B]`` in [0, 1], or NaN
            where a clip has none.
        clip_transitions: Transitions that a clip covers.
        frames_per_clip: Frames of them that are shown, the last outcome always among them.
        stride: Transitions from one clip's start to the next; None: no overlap.
        queue_clips: Clips that may wait. When the queue is full the oldest makes room.
        batch_clips: Clips scored at once, at most.
        max_wait_s: Seconds that a clip may wait for its batch to fill.
        mode: See above.
        timeout_s: Seconds for a batch until the scorer counts as hanging. In ``"sync"`` mode
            there is no limit.
        start_timeout_s: Seconds for the scorer to start and load, and again for its first batch,
            in which it may compile.
        duty_cycle: Share of the time that the scorer may compute, in (0, 1]; after a batch it
            rests until its share is kept. For a scorer on the learner's own GPU: the streams
            share one set of cores, and only new work sees that the learner's has priority
            (give it ``torch.cuda.Stream(priority=-1)``; a scorer's stream has the least, 0).
        backoff_s: Shortest and longest pause after a fault, in seconds.
        niceness: Of the worker process, 0 (as important as the learner) to 19.
        worker_threads: Threads that torch may use in the worker process.
        patience: Insertions after which an unseen trajectory counts as given up.
        seed: Chooses the random clips of `showcase`.

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
        check_scorer(scorer, transform)
        check_buffer(buffer, clip_transitions)
        check_clip_keys(transform, scorer)
        needs_frames = CLIP in scorer.in_keys
        needs = {EVENTS if key == EVENTS else RENDER_STATE for key in scorer.in_keys}
        self._buffer, self._transform, self._scorer = buffer, transform, scorer
        self._cutter = ClipCutter(
            clip_transitions, frames_per_clip, stride, needs=needs, patience=patience
        )
        self._cutting = threading.Lock()
        self._start_timeout_s = start_timeout_s
        self._blind = False  # pictures to look at failed
        self._ledger = Ledger(seed)
        self.mode = choose_mode(mode, scorer)
        self._worker = make_backend(
            self.mode,
            transform if needs_frames else None,
            scorer,
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            niceness=niceness,
            worker_threads=worker_threads,
        )
        self._dispatcher = Dispatcher(
            buffer,
            self._worker,
            self._ledger,
            queue_clips=queue_clips,
            batch_clips=batch_clips,
            max_wait_s=max_wait_s,
            duty_cycle=duty_cycle,
            backoff_s=backoff_s,
            threaded=self.mode != "sync",
        )
        # Runs when this object is collected and when the interpreter ends, Ctrl-C included.
        self._finalizer = weakref.finalize(self, self._dispatcher.close)

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
        if stored is not None and not fits:
            raise ValueError(f"stored is {shown(stored)}; pass a TensorDict {list(data.shape)}.")
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
            KeyError: If a key is missing.
            TypeError: If data is no TensorDict or index no tensor.
            ValueError: If index and data differ in length, index names what is no slot, source is
                no whole number, or the buffer's transforms may have stored other rows than
                ``data`` has.
            RuntimeError: If this scorer is closed.
        """
        self._check(data, source)
        check_index(index, self._buffer.storage.max_size)
        index = index.detach().reshape(-1).to("cpu", torch.int64)
        generation = self._stamps(data, index)
        with self._cutting:
            self._take(data, index, generation, source)

    def _check(self, data: TensorDictBase, source: int) -> None:
        self._cutter.check(data)
        if not is_whole(source, 0):
            raise ValueError(f"source is {shown(source)}; number the collectors 0, 1, …")
        if self._dispatcher.closed:
            raise RuntimeError("This AsyncScorer is closed; make a new one.")

    def _take(self, data: TensorDictBase, index: Tensor, generation: Tensor, source: int) -> None:
        clips = self._cutter.cut(data, index, generation, source)
        self._dispatcher.put(clips, self._cutter.transitions)

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
            self._dispatcher.put(self._cutter.flush(), self._cutter.transitions)

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
            timeout_s = self._start_timeout_s + _END_SECONDS
        return self._dispatcher.wait_until_ready(checked_seconds(timeout_s))

    def drain(self, timeout_s: float = 60.0, *, flush: bool = False) -> bool:
        """Wait until every queued clip is scored or given up.

        Args:
            timeout_s: Seconds to wait at most.
            flush: Queue the open clips first.

        Returns:
            Whether nothing is pending any more.
        """
        timeout_s = checked_seconds(timeout_s)
        if flush:
            self.flush()
        return self._dispatcher.drain(timeout_s)

    def statistics(self) -> dict[str, float]:
        """What became of the clips and how fast, for logging.

        ``clips_submitted = clips_scored + clips_late + clips_dropped + clips_failed +
        clips_pending``, and the same in ``transitions_…`` covered; ``clips_positive`` (score
        from 0.5 on); ``faults_{raised, invalid, unavailable, timeout, died, write}``; ``retries``;
        and of the last 30 seconds ``clips_per_s``, ``latency_s`` and ``latency_env_steps``: from
        the end of a clip to its score in the buffer, the latter in transitions inserted meanwhile.
        ``transitions_open`` are those whose clip is not complete.
        """
        with self._cutting:
            return {**self._ledger.statistics(), "transitions_open": float(len(self._cutter))}

    def showcase(self) -> dict[str, tuple[Tensor, float]]:
        """Clips to look at: the best-scored and a random one of those since the last call.

        Returns:
            ``"best"`` and ``"random"`` to (frames uint8 ``[F, 3, H, W]``, score); empty without
            a transform, if nothing was scored since, or if they cannot be drawn: that is logged
            once, and not tried again.
        """
        shown = self._ledger.pop_shown()
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
            text = " ".join(str(error).split())
            _LOGGER.warning("No clips will be shown: %s: %s", type(error).__name__, text)
            return {}

    def state_dict(self) -> dict[str, Any]:
        """Pending and open clips, counts and random states, as tensors and numbers.

        Take it before the buffer's: what is judged in between then has its score in the buffer
        and is judged once more; the other way round its score would be lost.
        """
        with self._cutting:
            pending, books = self._dispatcher.snapshot()
            return {
                **self._state_of_parts(),
                "pending": [clip.state_dict() for clip in pending],
                "ledger": books,
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
                check_slots(pending, self._buffer.storage.max_size)
                self._load_parts(state)
                self._ledger.load_state_dict(state["ledger"])
            except Exception as error:  # whatever a damaged state makes its reader say
                self._load_parts(before)
                raise ValueError(
                    "state must be one that AsyncScorer.state_dict returned for the same scorer "
                    f"and buffer, got {shown(state)}: {type(error).__name__}: {shown(error)}"
                ) from error
            self._dispatcher.put(pending, self._cutter.transitions, bounded=False)

    def _state_of_parts(self) -> dict[str, Any]:
        return {
            "cutter": self._cutter.state_dict(),
            "scorer": {name: module.get_extra_state() for name, module in self._of(SeededScorer)},
            "kept": {name: module.kept_state() for name, module in self._exact()},
        }

    def _load_parts(self, state: dict[str, Any]) -> None:
        self._cutter.load_state_dict(state["cutter"])
        for name, module in self._of(SeededScorer):
            module.set_extra_state(state["scorer"][name])
        for name, module in self._exact():
            module.load_kept_state(state["kept"][name])

    def _of(self, kind: type) -> list[tuple[str, Any]]:
        # A worker process has its own copy, which starts from the seed.
        return [pair for pair in self._scorer.named_modules() if isinstance(pair[1], kind)]

    def _exact(self) -> list[tuple[str, Any]]:
        # Bit by bit the same scores are the "sync" mode's promise; elsewhere this is weight only.
        return self._of(LocalScorer) if self.mode == "sync" else []

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None in other modes, and while there is none."""
        return self._worker.pid if isinstance(self._worker, ProcessBackend) else None

    def close(self) -> None:
        """End the worker, leaving what is pending unscored. May be called again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
