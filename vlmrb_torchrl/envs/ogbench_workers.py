"""Games played in another process, so that the physics of one batch uses several cores."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from torch import multiprocessing

_GOODBYE_SECONDS = 5.0
_GRACE_SECONDS = 10
"""How long a process asked to end by SIGTERM still answers: where a whole job is asked, whoever
plays finishes a step and saves."""


class RemoteGames:
    """`Games` in a process of its own: `send` returns at once, `receive` waits for the answer.

    Args:
        build: Builds the games, in that process; it is pickled.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        # Never by a fork: this process has threads, and a picture's context, maybe.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build), name="games", daemon=True
        )
        self._process.start()
        theirs.close()
        self._calls = 0

    def send(self, method: str, argument: Any) -> None:
        """Call a method of the games."""
        self._calls += 1
        with self._alive():
            self._connection.send((self._calls, method, argument))

    def receive(self) -> Any:
        """What the method called last returned; answers nobody waited for are passed over.

        Raises:
            RuntimeError: The process has died; what it wrote says why.
        """
        with self._alive():
            while True:
                call, answer = self._connection.recv()
                if call == self._calls:
                    return answer

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self._process.join(_GOODBYE_SECONDS)
            code = self._process.exitcode
            raise RuntimeError(
                f"A process of games has died (exit code {code}): its last words are above; "
                "with workers=1 the games run in this process."
            ) from None

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_GOODBYE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_GOODBYE_SECONDS)


def _serve(connection: Connection, build: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends it, by closing
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    games = build()
    while True:
        try:
            call, method, argument = connection.recv()
        except (EOFError, OSError):  # closed, maybe before the last answer was read
            return
        answer = getattr(games, method)(argument)
        with suppress(OSError):
            connection.send((call, answer))
