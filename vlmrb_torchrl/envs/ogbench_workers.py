"""Games played in another process, so that the physics of one batch uses several cores."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
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
        env_id: A registered task of OGBench.
        num_games: Games that the process plays.
    """

    def __init__(self, env_id: str, num_games: int) -> None:
        # Never by a fork: this process has threads, and a picture's context, maybe.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, env_id, num_games), name="games", daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, method: str, argument: Any) -> None:
        """Call a method of the games."""
        with self._alive():
            self._connection.send((method, argument))

    def receive(self) -> Any:
        """What the method returned.

        Raises:
            RuntimeError: The process has died; what it wrote says why.
        """
        with self._alive():
            return self._connection.recv()

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


def _serve(connection: Connection, env_id: str, num_games: int) -> None:
    from vlmrb_torchrl.envs.ogbench_games import Games

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends it, by closing
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    games = Games(env_id, num_games)
    while True:
        try:
            method, argument = connection.recv()
        except EOFError:
            return
        connection.send(getattr(games, method)(argument))
