"""MiniGrid DoorKey of any size: many games in step, in numpy.

Episodes, rewards and dynamics are those of MiniGrid's own ``DoorKeyEnv``, seed for seed and step
for step. What is observed instead of its partial view is the whole symbolic grid seen from the
agent.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded, Categorical

from vlmrb_torchrl.checks import is_whole, require
from vlmrb_torchrl.envs.base import SeededEpisodes
from vlmrb_torchrl.keys import RENDER_STATE
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.renderers.minigrid import Game, MiniGridRenderer

_MOST_CELLS = 256  # along an edge; beyond, an observation would take a quarter of a megabyte
_LEFT, _RIGHT, _FORWARD, _PICKUP, _DROP, _TOGGLE, _DONE = range(7)
_AHEAD = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # x, y of right, down, left, up

# Codes of the observation, and MiniGrid's type, colour and state of each.
_EMPTY, _WALL, _LOCKED, _CLOSED, _OPEN, _KEY, _GOAL = range(7)
_THINGS = np.array(
    [(1, 0, 0), (2, 5, 0), (4, 4, 2), (4, 4, 1), (4, 4, 0), (5, 4, 0), (8, 1, 0)], np.uint8
)

# What an action makes of the cell ahead: [action, whether the key is carried, code] -> code.
_AFTER = np.tile(np.arange(7, dtype=np.uint8), (7, 2, 1))
_AFTER[_PICKUP, 0, _KEY] = _EMPTY
_AFTER[_DROP, 1, _EMPTY] = _KEY
_AFTER[_TOGGLE, 1, _LOCKED] = _OPEN
_AFTER[_TOGGLE, :, _CLOSED] = _OPEN
_AFTER[_TOGGLE, :, _OPEN] = _CLOSED
_ENTERED = np.isin(np.arange(7), (_EMPTY, _OPEN, _GOAL))  # by code: whether one can walk into it


class DoorKeyEnv(SeededEpisodes):
    """N games of MiniGrid DoorKey: fetch the key, open the door, reach the goal.

    N: games, S: ``size``, n = S - 2: cells inside the walls.

    | entry | dtype, shape | |
    |---|---|---|
    | ``observation`` | uint8 ``[N, (2n-1)² + 1]`` | cells around the agent, rows from far ahead to far behind, the agent in the middle facing up: 0 empty or outside, 1 wall, 2 locked door, 3 closed door, 4 open door, 5 key, 6 goal; last: 1 if it carries the key |
    | ``render_state`` | uint8 ``[N, S, S, 4]`` | see ``minigrid_render_state`` |
    | ``events`` | bool ``[N, 3]`` | goal reached, door opened (from not open), key picked up |
    | ``action`` | int64 ``[N]`` | MiniGrid's: left, right, forward, pickup, drop, toggle, done |
    | ``reward`` | float32 ``[N, 1]`` | MiniGrid's: 1 - 0.9 steps / max_steps at the goal, else 0 |

    The goal terminates an episode; ``max_steps`` truncates it. Both can hold at once.

    Seeds: episode k of game i is MiniGrid's ``reset(seed=env.episode_seed(i, k))``, a function
    of ``seed``, i, k and ``held_out`` alone, not of what was played before or of N. Training
    and held-out episodes draw from disjoint halves of the seeds. Seeds are held out, layouts
    are not: DoorKey 6x6 has 816 starts in all, and both halves meet every one of them.

    Args:
        size: Cells along an edge of the grid, walls included; MiniGrid registers 5, 6, 8, 16.
        num_envs: Games that are stepped together, N.
        max_steps: Steps until truncation; None is MiniGrid's 10 size². It scales the reward.
        seed: Of the whole stream of episodes; ``set_seed`` restarts the stream with another.
        held_out: Play the episodes that training never draws, for evaluation.
        device: Where the tensors go. The games themselves are played on the CPU.

    Raises:
        ValueError: ``size`` below 5, or another number that is not positive; at a step, an action
            that is none.

    Example:
        >>> env = DoorKeyEnv(size=6, num_envs=4)
        >>> env.rollout(3)["observation"].shape
        torch.Size([4, 3, 50])
    """  # noqa: E501

    event_names = ("goal", "door", "key")
    success_event = "goal"
    prompts = MINIGRID
    _STATE = ("_board", "_seen", "_cell", "_facing", "_carries", "_steps", "_ended")

    def __init__(
        self,
        size: int = 8,
        num_envs: int = 16,
        *,
        max_steps: int | None = None,
        seed: int = 0,
        held_out: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        whole = is_whole(size, 5, _MOST_CELLS)
        require(whole, "size", size, f"DoorKey has two rooms, take 5 to {_MOST_CELLS}")
        limited = max_steps is None or is_whole(max_steps, 1)
        require(limited, "max_steps", max_steps, "take 1 or more, or None for 10 size²")
        super().__init__(num_envs, seed=seed, held_out=held_out, device=device)
        N, S = num_envs, size
        self.size = size
        self.max_steps: int = 10 * size**2 if max_steps is None else max_steps
        self._games, self._ahead = np.arange(N), _AHEAD @ (S, 1)  # by the direction faced
        # Before its first reset a game stands anywhere. Cells are numbered x S + y.
        self._board = np.zeros((N, S * S, 4), np.uint8)  # the render state
        self._cell, self._facing = np.full(N, S + 1), np.zeros(N, np.int64)  # of the agent
        self._carries, self._steps = np.zeros(N, np.uint8), np.zeros(N, np.int64)
        self._ended = np.ones((N, 2), bool)  # terminated, truncated
        # The codes of a game four times, one below the other, turned so that right, down, left, up
        # is on top, each in a margin as wide as one sees: what an agent sees is a window of it.
        self._reach = reach = S - 3
        width = S + 2 * reach
        self._seen = np.zeros((N, 4 * width, width), np.uint8)
        # Where the window of an agent in a cell begins, and, a margin further on, the cell is:
        # [directions, cells].
        x, y = np.divmod(np.arange(S * S), S)
        row = np.stack([S - 1 - x, S - 1 - y, x, y])
        self._row = row + width * np.arange(4)[:, None]
        self._column = np.roll(row, 1, 0)  # to the right is a quarter turn on
        observation = Bounded(0, 6, (N, (2 * reach + 1) ** 2 + 1), dtype=torch.uint8)
        self._observe(observation, Bounded(0, 10, (N, S, S, 4), dtype=torch.uint8))
        self.action_spec = Categorical(_DONE + 1, shape=(N,), dtype=torch.int64)

    def renderer(
        self, tile_size: int = 8, window: int | None = None, sprites: Game = "standard"
    ) -> MiniGridRenderer:
        """A renderer of ``render_state``; see ``MiniGridRenderer`` for the arguments."""
        return MiniGridRenderer(tile_size, window, sprites)

    def demonstrator(self) -> DoorKeyDemonstrator:
        """A policy that takes the shortest way to the goal."""
        return DoorKeyDemonstrator()

    def games_state_dict(self) -> dict[str, Any]:
        """The games as they stand, for `load_games_state_dict`."""
        state = {name: torch.from_numpy(getattr(self, name).copy()) for name in self._STATE}
        return {"stream": self.get_extra_state(), **state}

    def load_games_state_dict(self, state: dict[str, Any]) -> None:
        """Put the games back where they were, in the middle of their episodes."""
        self.set_extra_state(state["stream"])
        for name in self._STATE:
            getattr(self, name)[:] = state[name].numpy()

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        asked = self._asked(tensordict, "_reset")
        for i in asked:
            seed = self.episode_seed(i, self._episodes[i])
            self._episodes[i] += 1
            codes, self._cell[i], self._facing[i] = _start(seed, self.size)
            self._put(i, np.arange(codes.size), codes)
        self._board[asked, :, 3] = 0
        self._carries[asked] = self._steps[asked] = self._ended[asked] = 0
        return self._pack(np.zeros((self.num_envs, len(self.event_names)), bool))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action")
        whole = action.dtype == torch.int64 and action.shape == self.batch_size
        require(whole, "action", action, f"pass int64 [{self.num_envs}]")
        act = action.cpu().numpy()
        require(act.min() >= 0 and act.max() <= _DONE, "action", act, "pass 0 to 6")
        asked = np.zeros(self.num_envs, bool)
        asked[self._asked(tensordict, "_step")] = True
        act = np.where(asked, act, _DONE)  # the others wait
        games, cell, facing = self._games, self._cell, self._facing
        carries, steps = self._carries, self._steps
        front = cell + self._ahead[facing]
        ahead = self._inside[games, self._row[facing, cell] - 1, self._column[facing, cell]]
        after = _AFTER[act, carries, ahead]
        changed, entered = after != ahead, (act == _FORWARD) & _ENTERED[ahead]
        goal, opened = entered & (ahead == _GOAL), changed & (after == _OPEN)
        picked, dropped = changed & (ahead == _KEY), changed & (after == _KEY)
        self._put(games[changed], front[changed], after[changed])
        self._board[games, cell, 3] = 0
        np.copyto(cell, front, where=entered)
        facing += act == _RIGHT
        facing -= act == _LEFT
        facing %= 4
        carries += picked
        carries -= dropped
        steps += asked
        self._ended[asked] = np.column_stack([goal, steps >= self.max_steps])[asked]
        reward = np.where(goal, 1 - 0.9 * (steps / self.max_steps), 0).astype(np.float32)
        return self._pack(np.column_stack([goal, opened, picked]), reward[:, None])

    @property
    def _inside(self) -> NDArray[np.uint8]:
        """The codes less the margins above and to the left: a cell is at its row and column."""
        return self._seen[:, self._reach :, self._reach :]

    def _put(self, games: Any, cells: NDArray[np.int64], codes: NDArray[np.uint8]) -> None:
        """Write codes into cells, one of each game, or all of one."""
        self._board[games, cells, :3] = _THINGS[codes]
        self._inside[games, self._row[:, cells], self._column[:, cells]] = codes

    def _pack(
        self, events: NDArray[np.bool_], reward: NDArray[np.float32] | None = None
    ) -> TensorDict:
        N, S, games, edge = self.num_envs, self.size, self._games, 2 * self._reach + 1
        self._board[games, self._cell, 3] = self._facing + 1
        # As numpy's sliding_window_view, which takes a hundred times as long.
        height, strides = self._seen.shape[1] - edge + 1, self._seen.strides
        shape = N, height, S, edge, edge
        windows = np.ndarray(shape, np.uint8, self._seen, strides=(*strides, *strides[1:]))
        pose = self._facing, self._cell
        view = windows[games, self._row[pose], self._column[pose]].reshape(N, -1)
        observation = np.concatenate([view, self._carries[:, None]], 1)
        render_state = self._board.reshape(N, S, S, 4).copy()
        return self._outcome(observation, render_state, events, self._ended, reward)


def _start(seed: int, size: int) -> tuple[NDArray[np.uint8], int, int]:
    """How MiniGrid begins with a seed: codes ``[S²]``, the agent's cell and its direction.

    The draws are those of its ``DoorKeyEnv._gen_grid``, in their order, without its objects.
    """
    draw = np.random.default_rng(seed).integers
    grid = np.full((size, size), _WALL, np.uint8)
    grid[1:-1, 1:-1] = _EMPTY
    grid[-2, -2] = _GOAL
    wall = draw(2, size - 2)
    grid[wall] = _WALL
    codes = grid.reshape(-1)

    def draw_empty() -> int:
        while True:
            cell = int(draw(wall)) * size + int(draw(size))
            if codes[cell] == _EMPTY:
                return cell

    agent, facing = draw_empty(), int(draw(4))
    grid[wall, draw(1, size - 2)] = _LOCKED
    while (key := draw_empty()) == agent:
        pass
    codes[key] = _KEY
    return codes, agent, facing


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
        actions = []
        for grid, carried in zip(grids, carries, strict=True):
            plan = _plan(grid[..., :3].tobytes(), len(grid), bool(carried))
            x, y = np.argwhere(grid[..., 3])[0]
            actions.append(int(plan[grid[x, y, 3] - 1, x, y]))
        action = torch.tensor(actions, device=state.device)
        return tensordict.set("action", action.reshape(state.shape[:-3]))


_NEVER = 1 << 20  # actions; more than any way is long


@lru_cache(maxsize=4096)  # a layout occurs again and again: only key and door ever change it
def _plan(grid: bytes, size: int, carries: bool) -> NDArray[np.uint8]:
    """The best action of an agent that looks in direction d at cell x, y: uint8 ``[4, S, S]``."""
    # cost [4, S, S]: actions still to be made; toll [S, S]: those before a cell can be entered.
    cells = np.frombuffer(grid, np.uint8).reshape(size, size, 1, 3)
    code = (cells == _THINGS).all(-1).argmax(-1)
    key, locked = code == _KEY, code == _LOCKED
    toll = np.where(code == _WALL, _NEVER, 0)
    toll[key | locked | (code == _CLOSED)] = 1  # taken, opened
    cost = np.broadcast_to(np.where(code == _GOAL, 0, _NEVER), (4, size, size))
    if locked.any() and not carries:
        # Two legs: the key is worth what the way with it costs from where it is taken.
        with_key = _relax(cost, np.where(key, 0, toll))
        facing = np.stack([_shift(key, way) for way in _AHEAD])
        blocked = np.where(key | locked, _NEVER, toll)
        cost = _relax(np.where(facing, 1 + with_key, _NEVER), blocked)
        ahead = np.where(facing, with_key, _ahead(cost, blocked))
    else:
        cost = _relax(cost, toll)
        ahead = _ahead(cost, toll)
    act = np.where(toll == 0, _FORWARD, np.where(key, _PICKUP, _TOGGLE))
    ahead_act = np.stack([_shift(act, way) for way in _AHEAD])
    turns = np.roll(cost, 1, 0), np.roll(cost, -1, 0)  # what facing one further left, right costs
    choices = np.stack([ahead, *turns])
    best: NDArray[np.int64] = np.choose(choices.argmin(0), [ahead_act, _LEFT, _RIGHT])
    return best.astype(np.uint8)  # thousands of them are kept


def _relax(cost: NDArray[np.int64], toll: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lower the actions still to be made until no action lowers one further."""
    while True:
        turned = np.minimum(np.roll(cost, 1, 0), np.roll(cost, -1, 0))
        lower: NDArray[np.int64] = np.minimum(cost, 1 + np.minimum(turned, _ahead(cost, toll)))
        if (lower == cost).all():
            return lower
        cost = lower


def _ahead(cost: NDArray[np.int64], toll: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is left after one action on the cell in front, ``[4, S, S]``: a step, or its toll."""
    return np.stack([_shift(toll + cost[d], way) for d, way in enumerate(_AHEAD)])


def _shift(cells: NDArray[Any], way: NDArray[np.int64]) -> NDArray[Any]:
    """What lies ahead of each cell; round the border comes wall."""
    return np.roll(cells, tuple(-way), (0, 1))
