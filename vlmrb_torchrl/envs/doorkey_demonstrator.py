"""The shortest way through DoorKey, read off the symbolic grid."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from minigrid.core.constants import OBJECT_TO_IDX, STATE_TO_IDX
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from vlmrb_torchrl.keys import RENDER_STATE

_LEFT, _RIGHT, _FORWARD, _PICKUP, _, _TOGGLE = range(6)
_AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))  # x, y of right, down, left, up
_EMPTY = np.array([OBJECT_TO_IDX["empty"], 0, 0], np.uint8)
_NEVER = 1 << 20  # actions; more than any way is long


class DoorKeyDemonstrator(TensorDictModuleBase):
    """Acts optimally in `DoorKeyEnv`, from whatever state the games are in.

    Key taken or dropped, door locked, shut or open: the action is the first of a shortest way
    to the goal. It has no memory, so any share of its actions may be replaced by others.

    | entry | dtype, shape | |
    |---|---|---|
    | ``render_state`` | uint8 ``[N, S, S, 4]`` | read |
    | ``observation`` | uint8 ``[N, C + 1]``, the last 1 if the key is carried | read |
    | ``action`` | int64 ``[N]`` | written |

    Example:
        >>> env = DoorKeyEnv(size=8, num_envs=4)
        >>> bool(env.rollout(640, env.demonstrator())["next", "events"][..., 0].any())
        True
    """

    in_keys = (RENDER_STATE, "observation")
    out_keys = ("action",)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action of each game."""
        state = tensordict.get(RENDER_STATE)
        grids = state.reshape(-1, *state.shape[-3:]).cpu().numpy()
        carries = tensordict.get("observation")[..., -1].reshape(-1).tolist()
        actions = [_action(grid, bool(c)) for grid, c in zip(grids, carries, strict=True)]
        action = torch.tensor(actions, device=state.device)
        return tensordict.set("action", action.reshape(state.shape[:-3]))


def _action(grid: NDArray[np.uint8], carries: bool) -> int:
    x, y = np.argwhere(grid[..., 3])[0]
    plan = _plan(grid[..., :3].tobytes(), grid.shape[0], carries)
    return int(plan[grid[x, y, 3] - 1, x, y])


class _Map(NamedTuple):
    """A grid as the agent's legs see it. S: cells along an edge."""

    toll: NDArray[np.int64]  # actions before a cell can be entered, [S, S]
    goal: NDArray[np.bool_]  # [S, S]
    key: NDArray[np.bool_]  # a key that can be taken, [S, S]
    locked: bool


def _map(grid: NDArray[np.uint8], carries: bool) -> _Map:
    kind, state = grid[..., 0], grid[..., 2]
    door = kind == OBJECT_TO_IDX["door"]
    locked = door & (state == STATE_TO_IDX["locked"])
    key = kind == OBJECT_TO_IDX["key"]
    toll = np.where(kind == OBJECT_TO_IDX["wall"], _NEVER, 0)
    toll[key | door & (state != STATE_TO_IDX["open"])] = 1  # taken, opened
    if not carries:
        toll[locked] = _NEVER
    return _Map(toll, kind == OBJECT_TO_IDX["goal"], key, bool(locked.any()))


@lru_cache(maxsize=4096)  # a layout occurs again and again: only key and door ever change it
def _plan(grid: bytes, size: int, carries: bool) -> NDArray[np.uint8]:
    """The best action of an agent that looks in direction d at cell x, y: uint8 ``[4, S, S]``."""
    cells = np.frombuffer(grid, np.uint8).reshape(size, size, 3)
    here = _map(cells, carries)
    cost = np.broadcast_to(np.where(here.goal, 0, _NEVER), (4, size, size))
    if here.locked and not carries:
        # Two legs: the key is worth what the way with it costs from where it is taken.
        taken = np.where(here.key[..., None], _EMPTY, cells)
        with_key = _relax(cost, _map(taken, True).toll)
        facing = np.stack([_shift(here.key, way) for way in _AHEAD])
        cost = np.where(facing, 1 + with_key, _NEVER)
        toll = np.where(here.key, _NEVER, here.toll)
        cost = _relax(cost, toll)
        ahead = np.where(facing, with_key, _ahead(cost, toll))
    else:
        cost = _relax(cost, here.toll)
        ahead = _ahead(cost, here.toll)
    act = np.where(here.toll == 0, _FORWARD, np.where(here.key, _PICKUP, _TOGGLE))
    ahead_act = np.stack([_shift(act, way) for way in _AHEAD])
    turns = np.roll(cost, 1, 0), np.roll(cost, -1, 0)  # what facing one further left, right costs
    choices = np.stack([ahead, *turns])
    best: NDArray[np.int64] = np.choose(choices.argmin(0), [ahead_act, _LEFT, _RIGHT])
    return best.astype(np.uint8)  # thousands of them are kept


def _relax(cost: NDArray[np.int64], toll: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lower the actions still to be made, ``[4, S, S]``, until no action lowers one further."""
    while True:
        turned = np.minimum(np.roll(cost, 1, 0), np.roll(cost, -1, 0))
        lower: NDArray[np.int64] = np.minimum(cost, 1 + np.minimum(turned, _ahead(cost, toll)))
        if (lower == cost).all():
            return lower
        cost = lower


def _ahead(cost: NDArray[np.int64], toll: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is left after one action on the cell in front, ``[4, S, S]``: a step, or its toll."""
    return np.stack([_shift(toll + cost[d], way) for d, way in enumerate(_AHEAD)])


def _shift(cells: NDArray[Any], way: tuple[int, int]) -> NDArray[Any]:
    """What lies ahead of each cell; round the border comes wall."""
    return np.roll(cells, (-way[0], -way[1]), (0, 1))
