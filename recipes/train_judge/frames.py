"""First lesson of the embedded judge: what a single frame shows.

B: batch, D: width of the language model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.train_judge.data import CELL_CLASSES, KEY, ON_GOAL, OPEN_DOOR, SHUT_DOOR, FrameTable

MAPPED = (OPEN_DOOR, SHUT_DOOR, KEY, ON_GOAL)
CELLS = 64
STEPS_X = torch.tensor([1, 0, -1, 0])
STEPS_Y = torch.tensor([0, 1, 0, -1])


class FrameHeads(nn.Module):
    """Linear read-outs of a frame's token; only the vision stage uses them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = nn.Linear(width, CELLS)
        self.direction = nn.Linear(width, 4)
        self.under = nn.Linear(width, CELL_CLASSES)
        self.front = nn.Linear(width, CELL_CLASSES)
        self.maps = nn.Linear(width, len(MAPPED) * CELLS)

    def losses(self, token: Tensor, cells: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sum of the read-outs' losses.

        Args:
            token: Frame tokens, float32 ``[B, D]``.
            cells: What ``LABEL_VIEW`` drew of the same states, uint8 ``[B, 3, 8, 8]``.
        """
        kind, agent, heading = (cells[:, k].long().flatten(1) for k in range(3))
        here = agent.argmax(1)
        rows = torch.arange(len(here))
        facing = heading[rows, here]
        x, y = here % 8 + STEPS_X[facing], here // 8 + STEPS_Y[facing]
        inside = (x >= 0) & (x < 8) & (y >= 0) & (y < 8)
        ahead = kind[rows, (y.clamp(0, 7) * 8 + x.clamp(0, 7))] * inside
        maps = torch.stack([kind == k for k in MAPPED], 1).flatten(1).float()
        under = self.under(token)
        front = self.front(token)
        weight = torch.tensor(6.0)  # one cell in thirty holds such a thing
        loss = (
            F.cross_entropy(self.position(token), here)
            + F.cross_entropy(self.direction(token), facing)
            + 2 * F.cross_entropy(under, kind[rows, here])
            + 2 * F.cross_entropy(front, ahead)
            + 4 * F.binary_cross_entropy_with_logits(self.maps(token), maps, pos_weight=weight)
        )
        seen = (self.maps(token) > 0) == (maps > 0)
        on_goal = kind[rows, here] == ON_GOAL
        return loss, {
            "loss": float(loss.detach()),
            "position": float((self.position(token).argmax(1) == here).float().mean()),
            "direction": float((self.direction(token).argmax(1) == facing).float().mean()),
            "under": float((under.argmax(1) == kind[rows, here]).float().mean()),
            "front": float((front.argmax(1) == ahead).float().mean()),
            "map": float(seen.all(1).float().mean()),
            "goal": float(((under.argmax(1) == ON_GOAL) == on_goal).float().mean()),
        }


def edited_states(table: FrameTable, random: np.random.Generator, count: int) -> list[np.ndarray]:
    """States of the episodes, half of them with the agent put elsewhere, often at a goal.

    An episode shows its goal reached once at most; put there, the agent is seen on a goal from
    every side, and just as often beside it.
    """
    states = []
    for number in random.integers(0, len(table), count):
        state = table.state(int(number))
        if random.random() < 0.7:
            state = _moved_agent(state.copy(), random)
        states.append(state)
    return states


def _moved_agent(state: np.ndarray, random: np.random.Generator) -> np.ndarray:
    goals = np.argwhere(state[..., 0] == 8)
    free = np.argwhere((state[..., 0] == 1) | (state[..., 0] == 3))
    choice = random.random()
    if len(goals) and choice < 0.15 and len(free):  # the goal somewhere else
        old, new = goals[0], free[int(random.integers(len(free)))]
        state[old[0], old[1], :3] = (1, 0, 0)
        state[new[0], new[1], :3] = (8, 1, 0)
        goals = new[None]
    inside = np.array(state.shape[:2]) - 1
    cell = None
    if len(goals) and choice < 0.45:
        cell = goals[int(random.integers(len(goals)))]
    elif len(goals) and choice < 0.75:
        cell = goals[0] + random.choice([(1, 0), (-1, 0), (0, 1), (0, -1)])
    elif len(free):
        cell = free[int(random.integers(len(free)))]
    if cell is not None and (cell > 0).all() and (cell < inside).all():
        state[..., 3] = 0
        state[cell[0], cell[1], 3] = 1 + int(random.integers(4))
    return state
