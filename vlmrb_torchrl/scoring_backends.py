"""Where a scorer runs: in the caller or in a thread; `scoring_process` has the process."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Transform

from vlmrb_torchrl.checks import quoted, shown
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.scoring_worker import ScorerError, judge, load, one_line

_STUCK_THREADS = 4
"""A thread cannot be killed: so many may hang in the scorer before no further one is started."""


Mode = Literal["auto", "process", "thread", "sync"]


class Backend(Protocol):
    """Scores one batch at a time. One thread calls `start` and `score`, any thread `abort`."""

    def start(self) -> None:
        """Get ready, if not ready yet; raises `ScorerError` if that fails."""

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Scores of a batch of clips, float32 ``[B]``; raises `ScorerError` if there are none."""

    def abort(self) -> None:
        """Let `start` and `score` fail at once, now and from now on."""


class InlineBackend:
    """Runs the scorer in the thread that calls `score`. A scorer that hangs hangs it."""

    def __init__(self, transform: Transform | None, scorer: TensorDictModuleBase) -> None:
        self._transform, self._scorer = transform, scorer
        self._loaded = False

    def start(self) -> None:
        """Load the scorer."""
        if not self._loaded:
            load(self._scorer)
            self._loaded = True

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Score ``clips`` here and now."""
        self.start()
        return judge(self._transform, self._scorer, clips)

    def abort(self) -> None:
        """Nothing runs."""


@dataclass(slots=True, eq=False)
class _Job:
    """A question to the thread: load (``clips`` None) or score."""

    clips: TensorDictBase | None
    done: threading.Event = field(default_factory=threading.Event)
    scores: NDArray[np.float32] | None = None
    error: ScorerError | None = None


_Jobs: TypeAlias = "queue.SimpleQueue[_Job | None]"


class ThreadBackend:
    """Runs the scorer in a thread, on CUDA in a stream of its own.

    The stream has priority 0, the default and the least, and the learner's stream never waits for
    it; inputs are pinned. A thread that does not answer in time is abandoned and replaced by
    another one with the same scorer.

    Args:
        transform: Draws the clips, on the scorer's device.
        scorer: The scorer.
        timeout_s: Seconds for a batch.
        start_timeout_s: Seconds for the scorer to load.
    """

    def __init__(
        self,
        transform: Transform | None,
        scorer: TensorDictModuleBase,
        *,
        timeout_s: float,
        start_timeout_s: float,
    ) -> None:
        self._transform, self._scorer = transform, scorer
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._jobs: _Jobs | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # of the two below
        self._job: _Job | None = None
        self._aborted = False

    def start(self) -> None:
        """Start a thread, if there is none that answers, and let it load the scorer."""
        if self._jobs is not None:
            return
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= _STUCK_THREADS:
            raise ScorerError("timeout", f"{_STUCK_THREADS} calls of the scorer never came back")
        jobs: _Jobs = queue.SimpleQueue()
        # Daemonic: a scorer that hangs must not keep the interpreter from ending.
        thread = threading.Thread(
            target=_work, args=(jobs, self._transform, self._scorer), name="scorer", daemon=True
        )
        thread.start()
        self._threads.append(thread)
        self._jobs = jobs
        self._ask(jobs, _Job(None), self._start_timeout_s)

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Hand ``clips`` to the thread and wait for the answer."""
        self.start()
        assert self._jobs is not None
        scores = self._ask(self._jobs, _Job(clips), self._timeout_s)
        assert scores is not None
        return scores

    def _ask(self, jobs: _Jobs, job: _Job, timeout_s: float) -> NDArray[np.float32] | None:
        with self._lock:
            self._job = job
            if self._aborted:
                job.error = ScorerError("died", "aborted")
                job.done.set()
        jobs.put(job)
        if not job.done.wait(timeout_s):
            self._leave(jobs)
            raise ScorerError("timeout", f"no answer within {timeout_s:g} s")
        if job.error is not None:
            if job.clips is None:
                self._leave(jobs)
            raise job.error
        return job.scores

    def _leave(self, jobs: _Jobs) -> None:
        """Let the thread end as soon as it comes back; the next call starts another."""
        jobs.put(None)
        self._jobs = None

    def abort(self) -> None:
        """Stop waiting for the thread, and let it end after what it does."""
        with self._lock:
            self._aborted = True
            if self._job is not None and not self._job.done.is_set():
                self._job.error = ScorerError("died", "aborted")
                self._job.done.set()
        jobs = self._jobs
        if jobs is not None:
            jobs.put(None)


def _work(jobs: _Jobs, transform: Transform | None, scorer: TensorDictModuleBase) -> None:
    """Answer jobs until a None comes."""
    with contextlib.ExitStack() as stack:
        while (job := jobs.get()) is not None:
            try:
                if job.clips is None:
                    load(scorer)
                    stack.enter_context(_own_stream(scorer))
                else:
                    job.scores = judge(transform, scorer, _on_device_of(scorer, job.clips))
            except ScorerError as error:
                job.error = error
            except Exception as error:
                job.error = ScorerError("raised", one_line(error))
            job.done.set()


def device_of(scorer: TensorDictModuleBase) -> torch.device:
    """Where ``scorer`` computes; the CPU if it does not say."""
    return torch.device(getattr(scorer, "device", None) or "cpu")


def _own_stream(scorer: TensorDictModuleBase) -> contextlib.AbstractContextManager[Any]:
    device = device_of(scorer)
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)  # priority 0, the least
    # The weights may still be on their way. This stream waits for them, never the other way.
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _on_device_of(scorer: TensorDictModuleBase, clips: TensorDictBase) -> TensorDictBase:
    device = device_of(scorer)
    if device.type != "cuda":
        return clips
    return clips.pin_memory().to(device, non_blocking=True)


def check_scorer(scorer: Any, transform: Any) -> None:
    """Refuse what cannot be asked for scores.

    Raises:
        TypeError: ``scorer`` is no TensorDictModule, or ``transform`` no Transform.
        ValueError: The scorer reads frames and nothing draws them.
    """
    if not isinstance(scorer, TensorDictModuleBase):
        raise TypeError(
            f"scorer is {shown(scorer)}; pass a ClipScorer or another TensorDictModule."
        )
    if transform is not None and not isinstance(transform, Transform):
        raise TypeError(f"transform is {shown(transform)}; pass ClipRenderTransform(renderer).")
    if CLIP in scorer.in_keys and transform is None:
        raise ValueError(f"{scorer!r} reads frames; pass ClipRenderTransform(renderer).")


def choose_mode(mode: str, scorer: TensorDictModuleBase) -> str:
    """The mode that ``"auto"`` stands for, else ``mode`` itself.

    A scorer on CUDA waits for the GPU, which lets go of the interpreter lock: a thread does. One
    that computes on the CPU would take the lock from the learner: a process. One that is cheap
    costs less than the way to a process.
    """
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise ValueError(f"mode is {quoted(mode)}; choose one of {get_args(Mode)}.")
    if mode != "auto":
        return mode
    wants_process = device_of(scorer).type == "cpu" and not getattr(scorer, "cheap", False)
    return "process" if wants_process and os.name == "posix" else "thread"
