"""Seeds of episodes: a stream for each game, cut into two halves that never meet."""

from __future__ import annotations

import numpy as np


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
