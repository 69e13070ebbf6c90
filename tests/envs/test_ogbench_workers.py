"""Processes of games: calls and answers, and how they leave."""

from __future__ import annotations

import pytest

from vlmrb_torchrl.envs.ogbench_workers import RemoteGames


class Echo:
    """Games that answer what they are asked."""

    def play(self, argument: object) -> object:
        """Give it back."""
        return argument


def test_answer_belongs_to_the_last_call_and_leaving_with_one_unread_is_silent(
    capfd: pytest.CaptureFixture[str],
) -> None:
    games = RemoteGames(Echo)
    games.send("play", "first")
    games.send("play", "second")
    assert games.receive() == "second"
    games.send("play", "third")
    assert games._connection.poll(60)  # answered, and never read
    games._connection.close()
    games._process.join(60)
    assert games._process.exitcode == 0
    assert capfd.readouterr().err == ""
    games.close()
