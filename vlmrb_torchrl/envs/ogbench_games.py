"""OGBench's simulators, as `OGBenchEnv` plays them: compiled once, many games on one model.

The dynamics are OGBench's own code. Added is what a batch of games needs: they share a compiled
model, what OGBench computes again and again in a step is kept, and the actions that OGBench itself
draws at a reset follow the seed.

N: games, D: numbers observed, S: bytes of a render state, E: events.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Self

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray
from ogbench.manipspace.envs.cube_env import CubeEnv
from ogbench.manipspace.envs.manipspace_env import ManipSpaceEnv
from ogbench.manipspace.envs.scene_env import SceneEnv

from vlmrb_torchrl.checks import require


class Outcome(NamedTuple):
    """Where N games are, and what happened on the way."""

    observation: NDArray[np.float32]  # [N, D]
    render_state: NDArray[np.uint8]  # [N, S]
    events: NDArray[np.bool_]  # [N, E]
    reward: NDArray[np.float32]  # [N]
    terminated: NDArray[np.bool_]  # [N]


class _Game(ManipSpaceEnv):  # type: ignore[misc]
    """What is added to OGBench's environments, by inheritance before them."""

    # One space for all: OGBench makes a new one, unseeded, for each action that it draws.
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)
    detours: NDArray[np.bool_] | np.bool_ = np.False_  # subtasks that are to be undone and redone
    _info: dict[str, Any] | None = None  # of the observation
    _found: Any = None  # OGBench's verdict on the subtasks

    def begin(self, seed: int) -> None:
        """Reset to the episode that belongs to ``seed``."""
        self.action_space.seed(seed)
        self.observed, _ = self.reset(seed=seed)
        self._done = self.subtasks()
        self._due = ~self._done | self.detours  # subtasks whose event can still come
        self.events = np.zeros(1 + len(self._done), bool)
        self.reward, self.terminated = 0.0, False
        self._damping = self._model.dof_damping.copy()

    def play(self, action: NDArray[np.float32]) -> None:
        """One step; a subtask's event, once in an episode: not done before, and done now.

        What was done from the start has one only where the way to success undoes it: to press a
        button twice is no progress where nothing was locked.
        """
        # Locks are joints with a large damping, in the model that all games share.
        self._model.dof_damping[:] = self._damping
        self.observed, self.reward, self.terminated, _, info = self.step(action)
        self._damping = self._model.dof_damping.copy()
        before, self._done = self._done, self.subtasks()
        completed = self._due & self._done & ~before
        self._due &= ~completed
        self.events = np.array([info["success"], *completed], bool)

    def twin(self, model: Any) -> Self:
        """Another game of the same task, on ``model``."""
        other = copy.copy(self)
        other._model, other._data = model, mujoco.MjData(model)
        return other

    def subtasks(self) -> NDArray[np.bool_]:
        """Which subtasks are done, bool ``[E - 1]``."""
        return np.array(self._compute_successes(), bool)

    def pack(self) -> NDArray[np.uint8]:
        """The render state, uint8 ``[S]``: see `OGBenchEnv`."""
        parts = (self._data.qpos, self._data.qvel.astype(np.float32), self._buttons())
        return np.concatenate([part.view(np.uint8) for part in parts])

    def pose(self, state: NDArray[np.uint8]) -> None:
        """Put the scene into a render state, as OGBench would have drawn it."""
        cuts = 8 * self._model.nq, 8 * self._model.nq + 4 * self._model.nv
        length = cuts[1] + len(self._buttons())
        fits = state.dtype == np.uint8 and state.shape == (length,)
        got = f"{state.dtype} {list(state.shape)}"
        require(fits, "render_state", got, f"pass uint8 [*B, {length}]")
        qpos, qvel, buttons = np.split(state, cuts)
        self._found = None
        self.set_state(
            qpos.view(np.float64), qvel.view(np.float32), *([buttons] if len(buttons) else [])
        )
        colours = self._cube_success_colors if self.subtasks()[0] else self._cube_colors
        for geom in self._cube_geom_ids_list[0]:
            self._model.geom_rgba[geom, :3] = colours[0, :3]

    def _buttons(self) -> NDArray[np.uint8]:
        return np.asarray(getattr(self, "_cur_button_states", ()), np.uint8)

    # What OGBench computes before, in and after a step does not change in between: kept here.

    def compute_ob_info(self) -> dict[str, Any]:
        if self._info is None:
            self._info = super().compute_ob_info()
        return self._info

    def _compute_successes(self) -> Any:
        if self._found is None:
            self._found = super()._compute_successes()
        return self._found

    def pre_step(self) -> None:
        super().pre_step()
        self._info = self._found = None

    def initialize_arm(self) -> None:
        self._info = self._found = None
        super().initialize_arm()


class _SceneGame(_Game, SceneEnv):  # type: ignore[misc]
    def subtasks(self) -> NDArray[np.bool_]:
        cubes, buttons, drawer, window = self._compute_successes()
        return np.array([*cubes, *buttons, drawer, window], bool)


class _CubeGame(_Game, CubeEnv):  # type: ignore[misc]
    pass


# Of cube, drawer_lock, window_lock, drawer, window. What is locked has to be unlocked before it
# moves (tasks 2 and 5), and the drawer opened before the cube goes into it (4 and 5).
_LOCKS = np.array([False, True, True, False, False])
_DRAWER = np.array([False, False, False, True, False])
_DETOURS = {("scene", 2): _LOCKS, ("scene", 4): _DRAWER, ("scene", 5): _LOCKS | _DRAWER}


@lru_cache
def _prototype(family: str) -> _Game:
    """A compiled scene, which is slow and large: once in a process for all its tasks."""
    kind, env_id = {
        "scene": (_SceneGame, "scene-singletask-task1-v0"),
        "single": (_CubeGame, "cube-single-singletask-task1-v0"),
    }[family]
    compiled: _Game = kind(**gymnasium.spec(env_id).kwargs)
    compiled.begin(0)
    return compiled


def game(env_id: str) -> Any:
    """One game of a task, with a model of its own."""
    arguments = gymnasium.spec(env_id).kwargs
    family, task = arguments["env_type"], arguments["reward_task_id"]
    prototype = _prototype(family)
    first = prototype.twin(copy.copy(prototype._model))
    first._reward_task_id, first.detours = task, _DETOURS.get((family, task), np.False_)
    first.begin(0)
    return first


class Games:
    """N games of one task, stepped one after the other."""

    def __init__(self, env_id: str, num_games: int) -> None:
        first = game(env_id)
        self._games = [first, *(first.twin(first._model) for _ in range(num_games - 1))]
        self.begin(dict.fromkeys(range(num_games), 0))

    def begin(self, seeds: Mapping[int, int]) -> Outcome:
        """Reset games to the episodes that belong to their seeds; the others wait."""
        for i, seed in seeds.items():
            self._games[i].begin(seed)
        return self._outcome()

    def play(self, actions: Mapping[int, NDArray[np.float32]]) -> Outcome:
        """Step games by their actions; the others wait: their reward is 0, nothing happens."""
        for i, game in enumerate(self._games):
            if i in actions:
                game.play(actions[i])
            else:
                game.reward, game.events = 0.0, np.zeros_like(game.events)
        return self._outcome()

    def _outcome(self) -> Outcome:
        games = self._games
        return Outcome(
            np.stack([game.observed for game in games]).astype(np.float32),
            np.stack([game.pack() for game in games]),
            np.stack([game.events for game in games]),
            np.array([game.reward for game in games], np.float32),
            np.array([game.terminated for game in games], bool),
        )
