"""Judging a batch of clips: in the thread that asks, or in a process with a deadline.

A process is started by `BOOTSTRAP` instead of by ``multiprocessing``: it then neither imports the
user's script again (unless the scorer is defined there) nor refuses to start from a daemonic
process, and it ignores Ctrl-C, which a terminal sends to it too, from its first line on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import Transform

from vlmrb_torchrl.keys import SCORE
from vlmrb_torchrl.scorers.base import InvalidScoreError, ScorerUnavailableError, check_scores

FaultKind = Literal["raised", "invalid", "unavailable", "timeout", "died"]

BOOTSTRAP = """
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
import os, sys
descriptor, parent, niceness = map(int, sys.argv[1:])
os.nice(niceness)
from multiprocessing import spawn
from multiprocessing.connection import Connection
connection = Connection(descriptor)
spawn.prepare(connection.recv())
from vlmrb_torchrl.scoring_worker import serve
serve(connection, parent)
"""
"""Program of the process; arguments: file descriptor of its end of the pipe, pid of the parent,
niceness. The first message is what ``multiprocessing`` tells a spawned process."""
_IN_WORKER = "VLMRB_SCORING_WORKER"
"""Environment variable that is set in worker processes."""
_WATCH_SECONDS = 1.0
"""How long a process may outlive a parent that was killed while the process was busy."""
_EXIT_SECONDS = 3.0
"""How long a process may take to clean up after it was asked to end."""


class ScorerError(Exception):
    """A batch of which some clips, or all, got no score, and why.

    Attributes:
        kind: ``"raised"`` (the scorer raised), ``"invalid"`` (it answered something else than
            one number in [0, 1] per clip), ``"unavailable"`` (it cannot answer now, whatever the
            batch), ``"timeout"`` (no answer), ``"died"`` (its process, or its GPU's state in it).
        scores: Answer of the scorer, float32 ``[B]``, NaN for a clip without a score; None if
            there is none that could be told apart by clips.
    """

    def __init__(
        self, kind: FaultKind, message: str, scores: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__(kind, message, scores)  # all of them: it is pickled
        self.kind, self.message, self.scores = kind, message, scores

    def __str__(self) -> str:
        return self.message


# ---------------------------------------------------------------- judging


@contextlib.contextmanager
def _faults(scorer: object, while_: str = "") -> Iterator[None]:
    """Whatever is raised within becomes a `ScorerError`."""
    try:
        yield
    except InvalidScoreError as error:
        # Another scorer, which this one asks, may have been asked about other clips.
        given = error.scores if error.source is scorer else None
        scores = None if given is None else given.cpu().numpy()
        raise ScorerError("invalid", str(error), scores) from error
    except ScorerUnavailableError as error:
        raise ScorerError("unavailable", described(error)) from error
    except torch.AcceleratorError as error:  # mostly nothing runs there any more in this process
        raise ScorerError("died", while_ + described(error)) from error
    except Exception as error:
        raise ScorerError("raised", while_ + described(error)) from error


def load(scorer: TensorDictModuleBase) -> None:
    """Let ``scorer`` load what is heavy, if it is one that does."""
    with _faults(scorer, "loading the scorer failed: "):
        getattr(scorer, "load", lambda: None)()


def judge(
    transform: Transform | None, scorer: TensorDictModuleBase, clips: TensorDictBase
) -> NDArray[np.float32]:
    """Draw clips ``[B]``, if there is a transform, and score them: float32 ``[B]`` in [0, 1].

    What ``scorer`` reads goes to its device once: the states, if they are drawn there, or else
    the frames. Raises `ScorerError` if the transform or the scorer does, or a clip has no score.
    """
    B = clips.shape[0]
    with _faults(scorer), torch.no_grad():
        device = device_of(scorer)
        if transform is not None:
            renderer = getattr(transform, "renderer", None)
            clips = transform(_moved(clips, getattr(renderer, "device", device)))
        clips = _moved(clips.select(*scorer.in_keys, strict=False), device)
        scores = check_scores(scorer(clips).get(SCORE, None), B, scorer).cpu().numpy()
    if missing := int(np.isnan(scores).sum()):
        text = f"{type(scorer).__name__} gave {missing} of {B} clips no score"
        raise ScorerError("invalid", text, scores)
    return scores


def device_of(scorer: TensorDictModuleBase) -> torch.device:
    """Where ``scorer`` computes; the CPU if it does not say."""
    return torch.device(getattr(scorer, "device", None) or "cpu")


def _moved(clips: TensorDictBase, device: torch.device) -> TensorDictBase:
    def move(entry: Tensor) -> Tensor:
        if entry.device.type == "cpu" and device.type == "cuda":
            return entry.pin_memory().to(device, non_blocking=True)
        return entry.to(device)

    return clips.apply(move, device=None)  # no device of its own: a score may stay on the CPU


def _drawing_on(transform: Transform | None, device: torch.device) -> Transform | None:
    """One like ``transform`` that draws on ``device``, if its renderer can, else itself."""
    renderer: Any = getattr(transform, "renderer", None)
    if transform is None or not hasattr(renderer, "on"):
        return transform
    placed = transform.clone()
    placed.renderer = renderer.on(device)
    return placed


def described(error: BaseException) -> str:
    """``Type: message`` of an error, on one line of moderate length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


# ---------------------------------------------------------------- in the thread that asks


class InPlaceWorker:
    """Judges in the thread that calls, on CUDA in a stream of its own if told to.

    A call that hangs cannot be ended; whatever it answers, however late, is taken. One thread
    calls `start` and `score`, any thread the others; so it is with a `ProcessWorker`.
    """

    pid = None

    def __init__(
        self,
        transform: Transform | None,
        scorer: TensorDictModuleBase,
        timeout_s: float,
        start_timeout_s: float,
        own_stream: bool,
    ) -> None:
        self._transform, self._scorer = transform, scorer
        self._timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self._own_stream = own_stream
        self._stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._loaded = False
        self._limit_s = max(timeout_s, start_timeout_s)  # of the next batch: it may compile
        # The call that runs: when it should have ended, and its limit; then the last that was told.
        self._call: tuple[float, float] | None = None
        self._told: tuple[float, float] | None = None

    def start(self) -> None:
        """Load the scorer, if it is not loaded yet; raises `ScorerError` if that fails."""
        if self._loaded:
            return
        with self._within(self.start_timeout_s):
            load(self._scorer)
        device = device_of(self._scorer)
        self._transform = _drawing_on(self._transform, device)
        if self._own_stream and device.type == "cuda":
            # Of priority 0, the least. The weights may still be on their way: this stream waits
            # for them, nothing ever waits for it.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            self._stream = torch.cuda.stream(stream)
        self._loaded = True

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Scores of a batch of clips, float32 ``[B]``; raises `ScorerError` if one has none."""
        self.start()
        try:
            with self._within(self._limit_s), self._stream:
                return judge(self._transform, self._scorer, clips)
        finally:
            self._limit_s = self._timeout_s

    @contextlib.contextmanager
    def _within(self, limit_s: float) -> Iterator[None]:
        self._call = (time.monotonic() + limit_s, limit_s)
        try:
            yield
        finally:
            self._call = None

    def overdue(self) -> str:
        """What is to be said, once, of a call that takes longer than it may; else ``""``."""
        call = self._call
        if call is None or call is self._told or time.monotonic() < call[0]:
            return ""
        self._told = call
        return (
            f"no answer within {call[1]:g} s; a thread cannot be ended, so it is waited for, and "
            "clips that find no room meanwhile are dropped"
        )

    def abort(self) -> None:
        """Nothing can be ended."""


# ---------------------------------------------------------------- in a process


class ProcessWorker:
    """Judges in a process of its own, which shares no interpreter lock with the learner.

    It is killed when it does not answer in time, and started again for the next batch. It ends
    when this process ends, however that ends.
    """

    def __init__(
        self,
        transform: Transform | None,
        scorer: TensorDictModuleBase,
        timeout_s: float,
        start_timeout_s: float,
        niceness: int,
        threads: int,
    ) -> None:
        if os.environ.get(_IN_WORKER):
            raise RuntimeError(
                "AsyncScorer was made while its worker process imported your script; put the "
                'script\'s code under `if __name__ == "__main__":`, or the scorer into a module.'
            )
        try:
            # A transform that belongs to an environment would take it along: hence the clone.
            clone = None if transform is None else transform.clone()
            self._payload = pickle.dumps((clone, scorer))
        except Exception as error:
            raise ValueError(
                f"The scorer or its transform cannot be sent to a process ({error}); define what "
                'they use at the top level of a module, or pass mode="thread".'
            ) from error
        self._script: dict[str, str] = {}  # where the process imports the script that runs from
        if b"__main__" in self._payload:
            self._script = _script()
            if not self._script:
                raise ValueError(
                    "The scorer or its transform is defined in a script that is no file (standard "
                    "input, python -c, a notebook), from which a process cannot import it: put it "
                    'into a module, or pass mode="thread".'
                )
        self._timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self._limit_s = timeout_s  # of the next batch; the first may compile
        self._niceness, self._threads = niceness, threads
        self._lock = threading.Lock()  # of _process and _aborted
        self._process: Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._aborted = False

    @property
    def pid(self) -> int | None:
        """Process id; None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the process, if there is none, and let it load the scorer."""
        if self._connection is not None:
            return
        ours, theirs = Pipe()
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self._threads))
        arguments = map(str, (theirs.fileno(), os.getpid(), self._niceness))
        with self._lock, theirs:
            if self._aborted:
                raise ScorerError("died", "aborted")
            try:
                self._process = Popen(
                    [sys.executable, "-c", BOOTSTRAP, *arguments],
                    stdin=DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **one_thread, _IN_WORKER: "1"},
                )
            except OSError as error:
                text = f"its process did not start: {described(error)}"
                raise ScorerError("died", text) from error
        self._connection = ours
        place = {"sys_path": [path or os.getcwd() for path in sys.path], "dir": os.getcwd()}
        try:
            self._exchange(
                self.start_timeout_s, place | self._script, (self._payload, self._threads)
            )
        except ScorerError:
            self._end()
            raise
        self._limit_s = max(self._timeout_s, self.start_timeout_s)

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Send ``clips`` to the process and wait for the answer."""
        self.start()
        limit_s, self._limit_s = self._limit_s, self._timeout_s
        # As arrays: torch would put each tensor into shared memory.
        scores: NDArray[np.float32] = self._exchange(limit_s, (clips.numpy(), clips.shape[0]))
        return scores

    def _exchange(self, timeout_s: float, *messages: Any) -> Any:
        """Send ``messages`` and return the answer; a process that takes too long is ended.

        It may hang before it reads, and a message may be larger than the pipe: hence a thread
        that ends it, whatever is waited for.
        """
        process, connection = self._process, self._connection
        if process is None or connection is None:
            raise ScorerError("died", "aborted")
        late_at = time.monotonic() + timeout_s
        timer = threading.Timer(timeout_s, _end, [process])
        timer.daemon = True
        timer.start()
        try:
            for message in messages:
                connection.send(message)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            late, how = time.monotonic() >= late_at, self._end()
            if late:
                how = f"no answer within {timeout_s:g} s; its process was ended"
                raise ScorerError("timeout", how) from error
            raise ScorerError("died", how) from error
        finally:
            timer.cancel()
        if isinstance(answer, ScorerError):
            if answer.kind == "died":
                self._end()
            raise answer
        return answer

    def _end(self) -> str:
        """Let a process that is ending, or has nothing more to do, end; say how it did."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with self._lock:
            process, self._process = self._process, None
        return "its process is gone" if process is None else _end(process, ask=False)

    def overdue(self) -> str:
        """Nothing: what takes too long is ended."""
        return ""

    def abort(self) -> None:
        """End the process; a `score` that waits for it fails at once."""
        with self._lock:
            self._aborted = True
            process, self._process = self._process, None
            if process is not None:
                _end(process)


def _end(process: Popen[bytes], ask: bool = True) -> str:
    """End ``process``, by force if need be, and say how it ended.

    One whose pipe is closed need not be asked: it ends by itself, with a code of its own.
    """
    if ask:
        process.terminate()
    with contextlib.suppress(TimeoutExpired):
        return f"its process ended with code {process.wait(_EXIT_SECONDS)}"
    process.kill()
    process.wait()
    return "its process was killed"


def _script() -> dict[str, str]:
    """Where a process imports the script that runs from; empty if it is no file."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return {"init_main_from_name": main.__spec__.name}
    file = getattr(main, "__file__", None)
    if file is None or not os.path.isfile(file):
        return {}
    return {"init_main_from_path": os.path.abspath(file)}


# ---------------------------------------------------------------- the process itself


def serve(connection: Connection, parent: int) -> None:
    """Answer requests, each by scores or a `ScorerError`, until the pipe's other end closes."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Lets what the scorer imported clean up; a scorer that does not return is killed later.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with contextlib.suppress(EOFError, OSError):
        payload, threads = connection.recv()
        torch.set_num_threads(threads)
        try:
            with _faults(None, "the worker cannot read the scorer: "):
                transform, scorer = pickle.loads(payload)
            load(scorer)
        except ScorerError as error:
            connection.send(error)
            return
        transform = _drawing_on(transform, device_of(scorer))
        answer: Any = "ready"
        while True:
            connection.send(answer)
            arrays, clips = connection.recv()
            try:
                answer = judge(transform, scorer, TensorDict(arrays, [clips]))
            except ScorerError as error:
                answer = error


def _end_with(parent: int) -> None:
    # A closed pipe ends an idle worker at once; this ends one that hangs in its scorer.
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
