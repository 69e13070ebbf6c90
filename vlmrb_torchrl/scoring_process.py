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
from vlmrb_torchrl.scoring_backends import Backend, InlineBackend, ThreadBackend
from vlmrb_torchrl.scoring_worker import BOOTSTRAP, IN_WORKER, ScorerError, to_numpy

_EXIT_SECONDS = 3.0
"""How long a worker may take to clean up after it was asked to end."""


class ProcessBackend:
    """Runs the scorer in a process of its own, which shares no interpreter lock with the learner.

    It is killed when it does not answer in time, and started again for the next batch. It ends
    when this process ends, however that ends.

    Args:
        transform: Draws the clips, in the process.
        scorer: The scorer; it and ``transform`` are pickled here, once.
        timeout_s: Seconds for a batch.
        start_timeout_s: Seconds for the process to start and the scorer to load.
        niceness: Added to the process' niceness: 0 to compete with the learner as an equal,
            19 to take only what it leaves.
        threads: Threads that torch may use in the process.

    Raises:
        ValueError: If ``transform`` or ``scorer`` cannot be pickled.
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
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
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
        except (EOFError, OSError) as error:
            raise ScorerError("died", self._end(by_itself=True)) from error

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Send ``clips`` to the process and wait for the answer."""
        try:
            self.start()
            connection = self._connection
            assert connection is not None
            connection.send((to_numpy(clips), clips.shape[0]))
            kind, *answer = self._receive(connection, self._timeout_s)
        except (EOFError, OSError) as error:
            raise ScorerError("died", self._end(by_itself=True)) from error
        if kind != "scores":
            raise ScorerError(kind, *answer)
        scores: NDArray[np.float32] = answer[0]
        return scores

    def _receive(self, connection: Connection, timeout_s: float) -> Any:
        if not connection.poll(timeout_s):
            self._end()
            raise ScorerError(
                "timeout", f"no answer within {timeout_s:g} s; its process was killed"
            )
        return connection.recv()

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
        ours.send(_preparation(self._payload))
        ours.send((self._payload, self._threads))
        kind, *why = self._receive(ours, self._start_timeout_s)
        if kind != "ready":
            self._end(by_itself=True)
            raise ScorerError(kind, *why)

    def _end(self, by_itself: bool = False) -> str:
        """End the process if there is one; say how it ended."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with self._lock:
            process, self._process = self._process, None
        return "its process is gone" if process is None else _end(process, by_itself)

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
    data: dict[str, Any] = {
        "sys_path": [path or os.getcwd() for path in sys.path],
        "dir": os.getcwd(),
    }
    main = sys.modules["__main__"]
    if b"__main__" in payload:  # the scorer is defined in the script: import that, too
        if main.__spec__ is not None:
            data["init_main_from_name"] = main.__spec__.name
        elif getattr(main, "__file__", None) is not None:
            data["init_main_from_path"] = os.path.abspath(str(main.__file__))
    return data


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
    if mode == "sync":
        return InlineBackend(transform, scorer)
    if mode == "thread":
        return ThreadBackend(transform, scorer, **limits)
    return ProcessBackend(transform, scorer, niceness=niceness, threads=worker_threads, **limits)
