"""Transitions whose contents say what they are."""

import torch
from tensordict import TensorDict


def stream(trajectory_lengths, *, open_end=False, start=0, ids=None):
    """Transitions of one environment, [T]: transition k of the stream leads to state k + 1.

    A trajectory starts in a state of its own, minus its first transition's number minus 1; its
    last transition is done, unless ``open_end`` and it is the last trajectory.
    """
    T = sum(trajectory_lengths)
    number = torch.arange(start, start + T)
    first = torch.zeros(T, dtype=torch.bool)
    done = torch.zeros(T, 1, dtype=torch.bool)
    trajectory = torch.zeros(T, dtype=torch.int64)
    position = 0
    for count, length in enumerate(trajectory_lengths):
        first[position] = True
        trajectory[position : position + length] = count if ids is None else ids[count]
        position += length
        done[position - 1] = not (open_end and count == len(trajectory_lengths) - 1)
    return TensorDict(
        {
            "render_state": torch.where(first, -number - 1, number).unsqueeze(-1),
            "next": {
                "done": done,
                "render_state": (number + 1).unsqueeze(-1),
                "events": torch.stack([number % 5 == 0, number % 7 == 0], -1),
            },
            "collector": {"traj_ids": trajectory},
        },
        [T],
    )
