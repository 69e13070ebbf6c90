"""A scorer in a process of its own: the parent's side; `scoring_worker` has the other."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Transform

from vlmrb_torchrl.checks import MOST_SECONDS, is_positive, is_whole, shown
from vlmrb_torchrl.scoring_backends import Backend, InlineBackend
from vlmrb_torchrl.scoring_worker import (
    BOOTSTRAP,
    IN_WORKER,
    ScorerError,
    one_line,
    to_numpy,
)

_EXIT_SECONDS = 3.0
"""How long a worker may take to clean up after it was asked to end."""


class ProcessBackend:
    """Runs the scorer in a process of its own, which shares no interpreter lock with the learner.

    It is killed when it does not answer in time, and started again for the next batch. It ends
    when this process ends, however that ends. Its first batch, in which a scorer may compile,
    has the time of a start.

    Args:
        transform: Draws the clips, in the process.
        scorer: The scorer; it and ``transform`` are pickled here, once.
        timeout_s: Seconds for a batch, from sending it on.
        start_timeout_s: Seconds for the process to start and the scorer to load.
        niceness: Added to the process' niceness: 0 to compete with the learner as an equal,
            19 to take only what it leaves.
        threads: Threads that torch may use in the process.

    Raises:
        ValueError: If ``transform`` or ``scorer`` cannot be pickled, or is defined where no
            process can import it from.
        RuntimeError: If this process is itself a worker.
    """

    def __init__(
        self,
        transform: Transform | None,
        scorer: TensorDictModuleBase,
        *,
        timeout_s: float,
        start_timeout_s: float,
        niceness: int,
        threads: int,
    ) -> None:
        if os.environ.get(IN_WORKER):
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
        if _is_of_main(self._payload) and not _main():
            raise ValueError(
                "The scorer or its transform is defined in a script that is no file (standard "
                "input, python -c, a notebook), from which a process cannot import it: put it "
                'into a module, or pass mode="thread".'
            )
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._limit_s = timeout_s  # of the next batch
        self._niceness, self._threads = niceness, threads
        self._lock = threading.Lock()  # of _process and _aborted
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._aborted = False

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the process, if there is none, and let it load the scorer."""
        if self._connection is not None:
            return
        try:
            self._launch()
        except OSError as error:
            raise ScorerError("died", f"its process did not start: {one_line(error)}") from error
        kind, *why = self._exchange(
            self._start_timeout_s, _preparation(self._payload), (self._payload, self._threads)
        )
        if kind != "ready":
            self._end(by_itself=True)
            raise ScorerError(kind, *why)
        self._limit_s = max(self._timeout_s, self._start_timeout_s)

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Send ``clips`` to the process and wait for the answer."""
        self.start()
        kind, *answer = self._exchange(self._limit_s, (to_numpy(clips), clips.shape[0]))
        self._limit_s = self._timeout_s
        if kind != "scores":
            raise ScorerError(kind, *answer)
        scores: NDArray[np.float32] = answer[0]
        return scores

    def _launch(self) -> None:
        ours, theirs = Pipe()
        one_thread = {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        with self._lock, theirs:
            if self._aborted:
                raise ScorerError("died", "aborted")
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    BOOTSTRAP,
                    *map(str, (theirs.fileno(), os.getpid(), self._niceness)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **one_thread, IN_WORKER: "1"},
            )
        self._connection = ours

    def _exchange(self, timeout_s: float, *messages: Any) -> Any:
        """Send ``messages`` and return the answer; a process that takes too long is ended.

        It may hang before it reads, and a message may be larger than the pipe: hence a thread
        that ends it, whatever is waited for.
        """
        process, connection = self._process, self._connection
        assert process is not None
        assert connection is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            _end(process)

        timer = threading.Timer(timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            for message in messages:
                connection.send(message)
            return connection.recv()
        except (EOFError, OSError) as error:
            how = self._end(by_itself=True)
            if late.is_set():
                how = f"no answer within {timeout_s:g} s; its process was ended"
                raise ScorerError("timeout", how) from error
            raise ScorerError("died", how) from error
        finally:
            timer.cancel()

    def _end(self, by_itself: bool = False) -> str:
        """End the process if there is one; say how it ended."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with self._lock:
            process, self._process = self._process, None
        return "its process is gone" if process is None else _end(process, by_itself)

    def overdue(self) -> str:
        """Nothing: what takes too long is ended."""
        return ""

    def abort(self) -> None:
        """End the process; a `score` that waits for it fails at once."""
        with self._lock:
            self._aborted = True
            if self._process is not None:
                _end(self._process)


def _end(process: subprocess.Popen[bytes], by_itself: bool = False) -> str:
    """End ``process``, by force if need be; say how it ended.

    Args:
        process: The process.
        by_itself: Whether it closed its pipe and so is ending already, with a code of its own.
    """
    if not by_itself:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f"its process ended with code {process.wait(_EXIT_SECONDS)}"
    process.kill()
    process.wait()
    return "its process was killed"


def _preparation(payload: bytes) -> dict[str, Any]:
    """What a worker must know before it can import what ``payload`` names."""
    return {
        "sys_path": [path or os.getcwd() for path in sys.path],
        "dir": os.getcwd(),
        **(_main() if _is_of_main(payload) else {}),
    }


def _is_of_main(payload: bytes) -> bool:
    """Whether a pickle needs the script that runs."""
    return b"__main__" in payload


def _main() -> dict[str, str]:
    """Where a worker imports the script that runs from; empty if it is no file."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return {"init_main_from_name": main.__spec__.name}
    file = getattr(main, "__file__", None)
    if file is None or not os.path.isfile(file):
        return {}
    return {"init_main_from_path": os.path.abspath(file)}


def make_backend(
    mode: str,
    transform: Transform | None,
    scorer: TensorDictModuleBase,
    *,
    timeout_s: float,
    start_timeout_s: float,
    niceness: int,
    worker_threads: int,
) -> Backend:
    """The backend of a mode that `choose_mode` returned; arguments as in `AsyncScorer`."""
    for name, seconds in (("timeout_s", timeout_s), ("start_timeout_s", start_timeout_s)):
        if not is_positive(seconds, MOST_SECONDS):
            raise ValueError(
                f"{name} is {shown(seconds)}; choose above 0, up to {MOST_SECONDS:g} seconds."
            )
    if not is_whole(niceness, 0, 19):
        raise ValueError(f"niceness is {shown(niceness)}; choose 0 (as the learner) to 19 (least).")
    if not is_whole(worker_threads, 1):
        raise ValueError(
            f"worker_threads is {shown(worker_threads)}; it must be a whole number >= 1."
        )
    limits = {"timeout_s": timeout_s, "start_timeout_s": start_timeout_s}
    if mode == "process":
        return ProcessBackend(
            transform, scorer, niceness=niceness, threads=worker_threads, **limits
        )
    return InlineBackend(transform, scorer, own_stream=mode == "thread", **limits)
