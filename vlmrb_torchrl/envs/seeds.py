"""Seeds of episodes: a stream for each game, cut into two halves that never meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase

from vlmrb_torchrl.checks import is_whole, quoted, shown

MOST_GAMES = 1 << 16


def episode_seed(seed: int, game: int, episode: int, *, held_out: bool) -> int:
    """The seed of one episode, a function of these four numbers alone.

    Args:
        seed: Of the whole stream, 0 or more.
        game: Which of the games played together.
        episode: Which episode of that game, from 0.
        held_out: Whether training must never draw it.

    Returns:
        A number in [0, 2³¹) for training, in [2³¹, 2³²) for held-out episodes.
    """
    drawn = np.random.SeedSequence((seed, game, episode)).generate_state(1)[0]
    return int(drawn) >> 1 | held_out << 31


def check_seed(seed: object) -> None:
    """Raise ValueError unless ``seed`` is a whole number in [0, 2⁶³)."""
    if not is_whole(seed, 0, 2**63 - 1):
        raise ValueError(f"seed={shown(seed)}: take a whole number, 0 or more, below 2⁶³.")


def check_games(num_envs: object, held_out: object) -> None:
    """Raise ValueError unless so many games can be played."""
    if not is_whole(num_envs, 1, MOST_GAMES):
        raise ValueError(
            f"num_envs={shown(num_envs)}: play at least one game, and up to {MOST_GAMES}."
        )
    if not isinstance(held_out, bool):
        raise ValueError(f"held_out={quoted(held_out)}: say True or False.")


class SeededEpisodes(EnvBase):  # type: ignore[misc]
    """Games whose episodes are numbered, each with a seed of its own.

    A subclass sets ``num_envs`` and ``held_out``, then calls ``_set_seed``; when episode k of
    game i begins it takes ``episode_seed(i, k)``, with k from ``_episodes[i]``, and counts on.
    """

    num_envs: int
    held_out: bool

    def episode_seed(self, game: int, episode: int) -> int:
        """Seed that the simulator's reset gets for episode ``episode`` of game ``game``.

        Training episodes get seeds in [0, 2³¹), held-out ones in [2³¹, 2³²).
        """
        return episode_seed(self._seed, game, episode, held_out=self.held_out)

    def get_extra_state(self) -> dict[str, Any]:
        """For checkpoints: a restored environment goes on with the next episodes."""
        return {"seed": self._seed, "episodes": list(self._episodes)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_extra_state``; takes effect when the games are next reset."""
        episodes = list(state["episodes"])
        if len(episodes) != self.num_envs or not all(is_whole(each, 0) for each in episodes):
            raise ValueError(
                f"episodes={shown(episodes)}: the state is not one of {self.num_envs} games."
            )
        self._set_seed(state["seed"])
        self._episodes = episodes

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        check_seed(seed)
        self._seed = seed
        self._episodes = [0] * self.num_envs  # begun so far, per game
