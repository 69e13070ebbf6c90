"""MiniGrid DoorKey of any size, many games at once, without MiniGrid's costly observation.

The dynamics are MiniGrid's own: every game is its ``DoorKeyEnv``, stepped and reset by its own
code, with the partial view (nine tenths of a step's time) left out. What is observed instead
is the whole symbolic grid seen from the agent, gathered for all games together from one array
that is also the render state.
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
from vlmrb_torchrl.renderers.minigrid import MiniGridRenderer, minigrid_render_state

_MOST_CELLS = 256  # along an edge; beyond, an observation would take a quarter of a megabyte
_LEFT, _RIGHT, _FORWARD, _PICKUP, _DROP, _TOGGLE, _DONE = range(7)
_AHEAD = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # x, y of right, down, left, up
_GOAL_EVENT, _DOOR_EVENT, _KEY_EVENT = range(3)  # columns of `events`

# MiniGrid's indices, from minigrid.core.constants, whose import takes half a second.
_EMPTY, _WALL, _DOOR, _KEY, _GOAL = 1, 2, 4, 5, 8
_OPEN, _CLOSED, _LOCKED = range(3)

# (type | state << 4) of a cell -> code of the observation
_OBSERVED = np.zeros(64, np.uint8)
_SEEN = [(_WALL, 0), (_DOOR, _LOCKED), (_DOOR, _CLOSED), (_DOOR, _OPEN), (_KEY, 0), (_GOAL, 0)]
for _code, (_kind, _state) in enumerate(_SEEN, start=1):
    _OBSERVED[_kind | _state << 4] = _code


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
        self._games = [_game(size, max_steps) for _ in range(N)]
        self.max_steps: int = self._games[0].max_steps
        self._board = np.zeros((N, S * S, 4), np.uint8)  # the render state; cell x S + y
        self._ended = np.ones((N, 2), bool)  # terminated, truncated
        self._make_window()
        observation = Bounded(0, 6, (N, self._window.shape[1] + 1), dtype=torch.uint8)
        self._observe(observation, Bounded(0, 10, (N, S, S, 4), dtype=torch.uint8))
        self.action_spec = Categorical(_DONE + 1, shape=(N,), dtype=torch.int64)

    def renderer(self, tile_size: int = 8, window: int | None = None) -> MiniGridRenderer:
        """A renderer of ``render_state``; see ``MiniGridRenderer`` for the arguments."""
        return MiniGridRenderer(tile_size, window)

    def demonstrator(self) -> DoorKeyDemonstrator:
        """A policy that takes the shortest way to the goal."""
        return DoorKeyDemonstrator()

    def _make_window(self) -> None:
        """Where what is observed lies, from the agent, in a grid with a margin of ``_reach``."""
        self._reach = reach = self.size - 3
        self._width = self.size + 2 * reach
        ahead, right = np.mgrid[reach : -reach - 1 : -1, -reach : reach + 1].reshape(2, -1)
        step = _AHEAD @ (self._width, 1)  # by the direction faced
        # [directions, cells]; to the right is a quarter turn on
        self._window = np.outer(step, ahead) + np.outer(np.roll(step, -1), right)

    def games_state_dict(self) -> dict[str, Any]:
        """The games as they stand, for `load_games_state_dict`."""
        carried = [(0, 0, 0) if g.carrying is None else g.carrying.encode() for g in self._games]
        return {
            "stream": self.get_extra_state(),
            "board": torch.from_numpy(self._board.copy()),
            "steps": [game.step_count for game in self._games],
            "carried": [[int(code) for code in thing] for thing in carried],
            "ended": torch.from_numpy(self._ended.copy()),
        }

    def load_games_state_dict(self, state: dict[str, Any]) -> None:
        """Put the games back where they were, in the middle of their episodes."""
        from minigrid.core.grid import Grid
        from minigrid.core.world_object import WorldObj

        self.set_extra_state(state["stream"])
        self._board[:] = state["board"].numpy()
        self._ended[:] = state["ended"].numpy()
        S = self.size
        for game, board, steps, carried in zip(
            self._games, self._board, state["steps"], state["carried"], strict=True
        ):
            game.grid, _ = Grid.decode(board[:, :3].reshape(S, S, 3))
            cell = int(board[:, 3].argmax())
            game.agent_pos, game.agent_dir = divmod(cell, S), int(board[cell, 3]) - 1
            game.step_count, game.carrying = steps, WorldObj.decode(*carried)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        for i in self._asked(tensordict, "_reset"):
            self._games[i].reset(seed=self.episode_seed(i, self._episodes[i]))
            self._episodes[i] += 1
            self._board[i] = minigrid_render_state(self._games[i]).reshape(-1, 4)
            self._ended[i] = False
        return self._pack(np.zeros((self.num_envs, len(self.event_names)), bool))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action")
        whole = action.dtype == torch.int64 and action.shape == self.batch_size
        require(whole, "action", action, f"pass int64 [{self.num_envs}]")
        actions = action.tolist()
        require(min(actions) >= 0 and max(actions) <= _DONE, "action", actions, "pass 0 to 6")
        events = np.zeros((self.num_envs, len(self.event_names)), bool)
        reward = np.zeros((self.num_envs, 1), np.float32)
        for i in self._asked(tensordict, "_step"):
            if _PICKUP <= actions[i] < _DONE:
                self._act_on_cell(i, actions[i], events[i])
            else:
                _, reward[i], terminated, truncated, _ = self._games[i].step(actions[i])
                self._ended[i] = terminated, truncated
                events[i, _GOAL_EVENT] = terminated
        return self._pack(events, reward)

    def _act_on_cell(self, i: int, action: int, events: NDArray[np.bool_]) -> None:
        """Pick up, drop or toggle: the agent stays, the cell in front of it may change."""
        game = self._games[i]
        x, y = game.front_pos
        carried, was_open = game.carrying is not None, _is_open(game.grid.get(x, y))
        _, _, *ended, _ = game.step(action)
        self._ended[i] = ended
        front = game.grid.get(x, y)
        self._board[i, x * self.size + y, :3] = (_EMPTY, 0, 0) if front is None else front.encode()
        events[_DOOR_EVENT] = _is_open(front) and not was_open
        events[_KEY_EVENT] = game.carrying is not None and not carried

    def _pack(
        self, events: NDArray[np.bool_], reward: NDArray[np.float32] | None = None
    ) -> TensorDict:
        N, S, reach, width, board = self.num_envs, self.size, self._reach, self._width, self._board
        x, y = np.array([(int(x), int(y)) for x, y in (g.agent_pos for g in self._games)]).T
        facing = np.array([game.agent_dir for game in self._games])
        board[..., 3] = 0
        board[np.arange(N), x * S + y, 3] = facing + 1
        codes = np.zeros((N, width, width), np.uint8)
        inside = _OBSERVED.take(board[..., 0] | board[..., 2] << 4)
        codes[:, reach:-reach, reach:-reach] = inside.reshape(N, S, S)
        centre = (np.arange(N) * width + x + reach) * width + y + reach
        observation = np.empty((N, self._window.shape[1] + 1), np.uint8)
        observation[:, :-1] = codes.take(centre[:, None] + self._window.take(facing, 0))
        observation[:, -1] = [game.carrying is not None for game in self._games]
        render_state = board.reshape(N, S, S, 4).copy()
        return self._outcome(observation, render_state, events, self._ended, reward)


def _game(size: int, max_steps: int | None) -> Any:
    """MiniGrid's DoorKey that computes no view of its own; before its reset it stands anywhere."""
    from minigrid.envs.doorkey import DoorKeyEnv as MiniGridDoorKey

    game: Any = MiniGridDoorKey(size=size, max_steps=max_steps)
    game.gen_obs = dict
    game.agent_pos, game.agent_dir = (0, 0), 0
    return game


def _is_open(thing: Any) -> bool:
    return thing is not None and thing.type == "door" and thing.is_open


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
    kind, _, state = np.moveaxis(np.frombuffer(grid, np.uint8).reshape(size, size, 3), -1, 0)
    key, locked = kind == _KEY, (kind == _DOOR) & (state == _LOCKED)
    toll = np.where(kind == _WALL, _NEVER, 0)
    toll[key | (kind == _DOOR) & (state != _OPEN)] = 1  # taken, opened
    cost = np.broadcast_to(np.where(kind == _GOAL, 0, _NEVER), (4, size, size))
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
