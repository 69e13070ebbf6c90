"""MiniGrid DoorKey of any size, many games at once, without MiniGrid's costly observation.

The dynamics are MiniGrid's own: every game is its ``DoorKeyEnv``, stepped and reset by its own
code, with the partial view (nine tenths of a step's time) left out. What is observed instead
is the whole symbolic grid seen from the agent, gathered for all games together from one array
that is also the render state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from minigrid.core.constants import OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj
from minigrid.envs.doorkey import DoorKeyEnv as MiniGridDoorKey
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded

from vlmrb_torchrl import keys
from vlmrb_torchrl.checks import checked_device, is_whole, shown
from vlmrb_torchrl.envs.doorkey_demonstrator import DoorKeyDemonstrator
from vlmrb_torchrl.envs.seeds import SeededEpisodes, check_games, check_seed
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.renderers.minigrid import MiniGridRenderer

_MOST_CELLS = 256  # along an edge; beyond, an observation would take a quarter of a megabyte
_ACTIONS = 7  # left, right, forward, pickup, drop, toggle, done
_PICKUP, _DONE = 3, 6  # below: the agent moves; between: the cell in front of it may change
_GOAL, _DOOR, _KEY = range(3)  # columns of `events`
_EMPTY = (OBJECT_TO_IDX["empty"], 0, 0)
_AHEAD = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # x, y of right, down, left, up

# (type | state << 4) of a cell -> code of the observation
_OBSERVED = np.zeros(64, np.uint8)
for _kind, _state, _code in (
    ("wall", 0, 1),
    ("door", 2, 2),
    ("door", 1, 3),
    ("door", 0, 4),
    ("key", 0, 5),
    ("goal", 0, 6),
):
    _OBSERVED[OBJECT_TO_IDX[_kind] | _state << 4] = _code


class _Game(MiniGridDoorKey):  # type: ignore[misc]
    """MiniGrid's DoorKey that computes no view of its own."""

    def gen_obs(self) -> dict[str, Any]:
        return {}


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
        if not is_whole(size, 5, _MOST_CELLS):
            raise ValueError(
                f"size={shown(size)}: DoorKey needs two rooms, take 5 or more, up to {_MOST_CELLS}."
            )
        check_games(num_envs, held_out)
        if max_steps is not None and not is_whole(max_steps, 1):
            raise ValueError(f"max_steps={shown(max_steps)}: take 1 or more, or None for 10 size².")
        check_seed(seed)
        device = None if device is None else checked_device(device)
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        self.size = size
        self.num_envs = num_envs
        self.held_out = held_out
        self._games = [_Game(size=size, max_steps=max_steps) for _ in range(num_envs)]
        self.max_steps: int = self._games[0].max_steps
        self._set_seed(seed)
        self._make_specs()
        self._make_board()

    def renderer(self, tile_size: int = 8, window: int | None = None) -> MiniGridRenderer:
        """A renderer of ``render_state``; see ``MiniGridRenderer`` for the arguments."""
        return MiniGridRenderer(tile_size, window)

    def demonstrator(self) -> DoorKeyDemonstrator:
        """A policy that takes the shortest way to the goal."""
        return DoorKeyDemonstrator()

    def _make_specs(self) -> None:
        N, S, device = self.num_envs, self.size, self.device
        cells = (2 * (S - 2) - 1) ** 2
        bool_spec = Categorical(2, shape=(N, 1), dtype=torch.bool, device=device)
        self.observation_spec = Composite(
            {
                "observation": Bounded(0, 6, (N, cells + 1), device, torch.uint8),
                keys.RENDER_STATE: Bounded(0, 10, (N, S, S, 4), device, torch.uint8),
                keys.EVENTS: Binary(
                    len(self.event_names), (N, len(self.event_names)), device, torch.bool
                ),
            },
            shape=(N,),
            device=device,
        )
        self.action_spec = Categorical(_ACTIONS, shape=(N,), dtype=torch.int64, device=device)
        self.reward_spec = Unbounded((N, 1), device, torch.float32)
        self.done_spec = Composite(
            {name: bool_spec.clone() for name in ("done", "terminated", "truncated")},
            shape=(N,),
            device=device,
        )

    def _make_board(self) -> None:
        """Lay out the arrays of all games; one cell index is x S + y, as in MiniGrid's encode."""
        N, S = self.num_envs, self.size
        self._board = np.zeros((N, S * S, 4), np.uint8)  # the render state
        self._carries = np.zeros(N, np.uint8)
        self._cell = [0] * N  # of the agent
        self._facing = [0] * N
        self._ended = np.ones((N, 2), bool)  # terminated, truncated
        self._ahead = [int(x) * S + int(y) for x, y in _AHEAD]

        # Windows are gathered from codes with a margin of `reach` cells around the inside.
        reach = S - 3
        width = S - 2 + 2 * reach
        self._codes = np.zeros((N, width, width), np.uint8)
        self._walled = slice(reach - 1, reach + S - 1)  # where the grid lies in them
        x, y = np.divmod(np.arange(S * S), S) + np.array([[reach - 1], [reach - 1]])
        self._centre = x * width + y  # of the window, per cell
        self._row = np.arange(N) * width * width  # first code of each game
        steps = np.arange(-reach, reach + 1)
        right = np.roll(_AHEAD, -1, axis=0)  # a quarter turn on
        seen = (
            -steps[:, None, None, None] * _AHEAD + steps[None, :, None, None] * right
        )  # [rows, columns, facing, xy]
        self._window = np.ascontiguousarray(
            (seen[..., 0] * width + seen[..., 1]).reshape(-1, len(_AHEAD)).T
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        games: Iterable[int] = range(self.num_envs)
        if asked is not None:
            games = asked.reshape(-1).nonzero().flatten().tolist()
        for i in games:
            self._begin(i)
        return self._pack(np.zeros((self.num_envs, len(self.event_names)), bool))

    def _begin(self, i: int) -> None:
        game = self._games[i]
        game.reset(seed=self.episode_seed(i, self._episodes[i]))
        self._episodes[i] += 1
        rows = [_EMPTY if thing is None else thing.encode() for thing in game.grid.grid]
        grid = np.array(rows, np.uint8).reshape(self.size, self.size, 3)  # [y, x]
        self._board[i, :, :3] = grid.swapaxes(0, 1).reshape(-1, 3)
        self._carries[i] = 0
        self._ended[i] = False
        self._locate(i)

    def games_state_dict(self) -> dict[str, Any]:
        """The games as they stand, for `load_games_state_dict`."""
        carried = [(0, 0, 0) if g.carrying is None else g.carrying.encode() for g in self._games]
        return {
            "stream": self.get_extra_state(),
            "board": torch.from_numpy(self._board.copy()),
            "cell": list(self._cell),
            "facing": [int(facing) for facing in self._facing],
            "steps": [game.step_count for game in self._games],
            "carried": [[int(code) for code in thing] for thing in carried],
            "ended": torch.from_numpy(self._ended.copy()),
        }

    def load_games_state_dict(self, state: dict[str, Any]) -> None:
        """Put the games back where they were, in the middle of their episodes."""
        self.set_extra_state(state["stream"])
        self._board[:] = state["board"].numpy()
        self._ended[:] = state["ended"].numpy()
        self._cell, self._facing = list(state["cell"]), list(state["facing"])
        S = self.size
        for i, game in enumerate(self._games):
            game.grid, _ = Grid.decode(self._board[i, :, :3].reshape(S, S, 3))
            game.agent_pos = divmod(self._cell[i], S)
            game.agent_dir = self._facing[i]
            game.step_count = state["steps"][i]
            game.carrying = WorldObj.decode(*state["carried"][i])
            self._carries[i] = game.carrying is not None

    def _locate(self, i: int) -> None:
        x, y = self._games[i].agent_pos
        self._cell[i] = int(x) * self.size + int(y)
        self._facing[i] = self._games[i].agent_dir

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action")
        actions = action.tolist()
        whole = action.dtype == torch.int64 and action.shape == self.batch_size
        if not whole or min(actions) < 0 or max(actions) >= _ACTIONS:
            raise ValueError(
                f"action is {shown(action)} with {shown(actions)}: pass int64 [{self.num_envs}] "
                f"from 0 to {_ACTIONS - 1}."
            )
        asked = tensordict.get("_step", None)
        games: Iterable[int] = range(self.num_envs)
        if asked is not None:  # the others wait: their state stays, their reward is 0
            games = asked.reshape(-1).nonzero().flatten().tolist()
        events = np.zeros((self.num_envs, len(self.event_names)), bool)
        reward = np.zeros((self.num_envs, 1), np.float32)
        for i in games:
            action = actions[i]
            if _PICKUP <= action < _DONE:
                terminated, truncated = self._act_on_cell(i, action, events)
            else:
                _, reward[i], terminated, truncated, _ = self._games[i].step(action)
                self._locate(i)
                events[i, _GOAL] = terminated
            self._ended[i] = terminated, truncated
        packed = self._pack(events)
        packed.set("reward", torch.from_numpy(reward).to(self.device))
        return packed

    def _act_on_cell(self, i: int, action: int, events: NDArray[np.bool_]) -> tuple[bool, bool]:
        """Pick up, drop or toggle: the agent stays, the cell in front of it may change."""
        game = self._games[i]
        front = self._cell[i] + self._ahead[self._facing[i]]
        x, y = divmod(front, self.size)
        before = game.grid.get(x, y)
        was_open = before is not None and before.type == "door" and before.is_open
        _, _, terminated, truncated, _ = game.step(action)
        after = game.grid.get(x, y)
        self._board[i, front, :3] = _EMPTY if after is None else after.encode()
        carries = game.carrying is not None
        is_open = after is not None and after.type == "door" and after.is_open
        events[i, _DOOR] = is_open and not was_open
        events[i, _KEY] = carries and not self._carries[i]
        self._carries[i] = carries
        return terminated, truncated

    def _pack(self, events: NDArray[np.bool_]) -> TensorDict:
        """Everything observed, in arrays of its own (the games' arrays live on)."""
        N, S, board = self.num_envs, self.size, self._board
        cell, facing = np.array(self._cell), np.array(self._facing)
        board[..., 3] = 0
        board[np.arange(N), cell, 3] = facing + 1
        codes = _OBSERVED.take(board[..., 0] | board[..., 2] << 4)
        self._codes[:, self._walled, self._walled] = codes.reshape(N, S, S)
        observation = np.empty((N, self._window.shape[1] + 1), np.uint8)
        where = (self._row + self._centre.take(cell))[:, None] + self._window.take(facing, 0)
        observation[:, :-1] = self._codes.reshape(-1).take(where)
        observation[:, -1] = self._carries
        terminated, truncated = self._ended[:, :1].copy(), self._ended[:, 1:].copy()
        arrays = {
            "observation": observation,
            keys.RENDER_STATE: board.reshape(N, S, S, 4).copy(),
            keys.EVENTS: events,
            "done": terminated | truncated,
            "terminated": terminated,
            "truncated": truncated,
        }
        return TensorDict(
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            batch_size=self.batch_size,
            device=self.device,
        )
