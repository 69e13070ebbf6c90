"""n-step transitions in closed form: rewards, where they lead, and that nothing is bootstrapped
from a terminal state."""

import pytest
import torch
from tensordict import TensorDict

from recipes.transitions import Transitions


def played(*ends):
    """One game for each list of ends, which are "terminated", "truncated" or None.

    Rewards 1, 2, 4, … in the first game, ten times those in the second; the observation counts
    steps, over the end of episodes too, from 0 in the first game and from 100 in the second.
    """
    games, steps = range(len(ends)), range(len(ends[0]))

    def column(value):
        return torch.tensor([[value(g, t) for t in steps] for g in games]).unsqueeze(-1)

    return TensorDict(
        {
            "observation": column(lambda g, t: 100.0 * g + t),
            "action": column(lambda g, t: 0.0),
            "events": column(lambda g, t: False),
            "next": {
                "observation": column(lambda g, t: 100.0 * g + t + 1),
                "reward": column(lambda g, t: 10.0**g * 2**t),
                "done": column(lambda g, t: ends[g][t] is not None),
                "terminated": column(lambda g, t: ends[g][t] == "terminated"),
            },
        },
        [len(games), len(steps)],
    )


ENDED, CUT = "terminated", "truncated"


def row(transitions, *key, game=0):
    return transitions[key].squeeze(-1)[game].tolist()


def test_without_a_future_there_is_nothing_to_sum():
    data = played([None, ENDED, None])
    several, single = Transitions(0.0, 3)(data), Transitions(0.0, 1)(data)
    assert row(several, "next", "reward") == row(single, "next", "reward") == [1, 2, 4]


def test_three_steps_end_where_the_episode_or_the_batch_does():
    data = played([None, None, None, ENDED, None, None], [None, CUT, None, None, None, None])
    kept = Transitions(gamma=0.5, n_steps=3, reward_scale=2.0)(data)
    # γ = 1/2 and rewards that double: each step of a span adds as much as its first.
    assert row(kept, "next", "reward") == [6, 12, 16, 16, 64, 64]
    assert row(kept, "next", "observation") == [3, 4, 4, 4, 6, 6]
    assert row(kept, "next", "terminated") == [False, True, True, True, False, False]
    assert row(kept, "steps_to_next_obs") == [3, 3, 2, 1, 2, 1]
    assert row(kept, "observation") == row(data, "observation")
    assert row(data, "next", "reward") == [1, 2, 4, 8, 16, 32]
    assert row(kept, "next", "reward", game=1) == [40, 40, 240, 480, 640, 640]
    assert row(kept, "next", "observation", game=1) == [102, 102, 105, 106, 106, 106]
    assert row(kept, "next", "done", game=1) == [True, True, False, False, False, False]
    assert not any(row(kept, "next", "terminated", game=1))
    assert row(kept, "steps_to_next_obs", game=1) == [2, 1, 3, 3, 2, 1]


def test_time_limit_ends_a_span_and_is_bootstrapped():
    kept = Transitions(gamma=0.5, n_steps=2)(played([None, CUT, None]))
    assert row(kept, "next", "done") == [True, True, False]
    assert row(kept, "next", "terminated") == [False, False, False]
    assert row(kept, "next", "observation") == [2, 2, 3]


@pytest.mark.parametrize("n_steps", [1, 3])
def test_episode_alone_is_as_in_a_batch(n_steps):
    data = played([None, None, None, ENDED])
    transitions = Transitions(gamma=0.9, n_steps=n_steps)
    assert (transitions(data[0]) == transitions(data)[0]).all()


def test_one_step_keeps_what_the_loss_reads_and_nothing_else():
    data = played([None, ENDED], [None, None])
    kept = Transitions(gamma=0.9)(data)
    assert (kept == data.exclude("events")).all()
    assert kept.get("steps_to_next_obs", None) is None
