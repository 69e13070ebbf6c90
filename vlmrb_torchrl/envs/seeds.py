"""Seeds of episodes: a stream for each game, cut into two halves that never meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase


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
        self._set_seed(state["seed"])
        self._episodes = list(state["episodes"])

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        if seed < 0:
            raise ValueError(f"seed={seed}: take 0 or more.")
        self._seed = seed
        self._episodes = [0] * self.num_envs  # begun so far, per game
