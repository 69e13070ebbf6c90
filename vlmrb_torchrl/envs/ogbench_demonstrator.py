"""A way to success in OGBench's scenes: its own oracles, one subtask after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from vlmrb_torchrl.envs.ogbench_games import game

_ALIGNED = 0.04  # metres: an oracle that is this close from above goes down
_CLOSE = 0.06  # metres: an object that may be in the gripper, or under it
_LOOSE = 0.03  # metres: OGBench's tolerance is 0.04
_GENTLE = 0.15  # a cube is let down within 0.02 m; OGBench's own step can overshoot
_REST = np.array([0.425, 0.0, 0.3])  # where the arm goes when nothing is left to do
_CENTRE, _SCALE = np.array([0.425, 0.0, 0.0]), 10.0  # of positions in the observation
_OPEN = -0.16  # position of the open drawer
# Where a cube is let down into the open drawer, so that closing it brings the cube to its goal.
_INTO_DRAWER = np.array([0.33, -0.23, 0.066])
_LOCKS = {"drawer": "button_0", "window": "button_1"}  # pressed, they lock and unlock

Info = dict[str, Any]
Place = NDArray[np.float64]  # x, y, z in metres


class _Oracle(NamedTuple):
    """One of OGBench's oracles, and what it handles."""

    act: Any  # OGBench's MarkovOracle
    safe: float  # metres: it leaves its object upwards, to here
    tight: float  # metres: it goes on until its object is this close to the target


class _Slide:
    """A handle on a rail, measured by moving it."""

    def __init__(self, scene: Any, name: str) -> None:
        site, rail = scene._data.site(f"{name}_handle_center"), scene._data.joint(f"{name}_slide")
        places = []
        for position in (0.0, 0.1):
            rail.qpos[0] = position
            mujoco.mj_kinematics(scene.model, scene.data)
            places.append(site.xpos.copy())
        self._origin, self._axis = places[0], (places[1] - places[0]) / 0.1
        self.yaw = np.array([float(np.arctan2(site.xmat[3], site.xmat[0]))])

    def at(self, position: float) -> Place:
        """Where the handle is."""
        place: Place = self._origin + position * self._axis
        return place


class OGBenchDemonstrator(TensorDictModuleBase):
    """Solves a task of `OGBenchEnv`, from whatever state the games are in.

    OGBench's Markov oracles choose the actions; this chooses which of them acts on what: locked
    things are unlocked first, the cube goes into the open drawer, locks are set at the end, and an
    arm that is down at another object first lets go of it and rises. It has no memory: after
    other actions it goes on from where they led. It bears normal noise on its actions; random
    actions let a carried cube fall.

    | entry | dtype, shape | |
    |---|---|---|
    | ``observation`` | float32 ``[N, D]`` | read |
    | ``action`` | float32 ``[N, 5]`` | written |

    Args:
        env_id: The task, as of `OGBenchEnv`.

    Example:
        >>> env = OGBenchEnv("scene-singletask-task1-v0", num_envs=4)
        >>> bool(env.rollout(300, env.demonstrator())["next", "events"][..., 0].any())
        True
    """

    in_keys = ("observation",)
    out_keys = ("action",)

    def __init__(self, env_id: str) -> None:
        super().__init__()
        scene = game(env_id)
        goal = scene.cur_task_info.get("goal", {})  # the single cube has none
        self._goal = goal
        self._cube_goal = goal["block_xyzs"][0] if goal else scene.cur_task_info["goal_xyzs"][0]
        button = _Oracle(ButtonMarkovOracle(env=None), 0.16, 0.0)
        self._oracles = {
            "cube": _Oracle(CubeMarkovOracle(env=None, min_norm=_GENTLE), 0.16, 0.02),
            "drawer": _Oracle(DrawerMarkovOracle(env=None), 0.18, 0.02),
            "window": _Oracle(WindowMarkovOracle(env=None), 0.28, 0.02),
            "button_0": button,
            "button_1": button,
        }
        for oracle in self._oracles.values():  # what their reset draws at random
            oracle.act._final_pos, oracle.act._final_yaw, oracle.act._step = _REST, 0.0, 0
        if goal:
            self._slides = {name: _Slide(scene, name) for name in _LOCKS}
            self._tops = {
                button: scene._data.site(f"btntop_{button[-1]}").xpos.copy()
                for button in _LOCKS.values()
            }
            self._stow = self._in_drawer(self._cube_goal, goal["drawer_pos"], held=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action of each game."""
        observation = tensordict.get("observation")
        rows = observation.reshape(-1, observation.shape[-1]).cpu().double().numpy()
        actions = np.stack([self._action(row) for row in rows]).astype(np.float32)
        action = torch.from_numpy(actions).to(observation.device)
        return tensordict.set("action", action.reshape(*observation.shape[:-1], 5))

    def _action(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        info = _info(row)
        if not self._goal:
            return self._move("cube", self._cube_goal, info)
        # Where the hand has to go first.
        places = {"cube": info["privileged/block_0_pos"]}
        for name, slide in self._slides.items():
            places[name] = slide.at(info[f"privileged/{name}_pos"][0])
            info[f"privileged/{name}_handle_pos"] = places[name]
            info[f"privileged/{name}_handle_yaw"] = slide.yaw
        places |= self._tops
        name, target = self._next(info, places)
        hand = info["proprio/effector_pos"]
        if _flat_distance(places[name], hand) > _ALIGNED:
            for other, place in places.items():
                if _flat_distance(place, hand) <= _CLOSE and hand[2] < self._oracles[other].safe:
                    return self._move(other, place, info, leave=True)
        return self._move(name, target, info)

    def _next(self, info: Info, places: dict[str, Place]) -> tuple[str, Place]:
        """What is to be done now: an object's name, and its target (of a button, itself)."""
        hand = info["proprio/effector_pos"]

        def held(name: str) -> bool:
            return bool(np.linalg.norm(places[name] - hand) <= _CLOSE)

        def far(name: str, target: Place) -> bool:
            """Whether it is not there yet: measured closer while the hand is at it."""
            within = self._oracles[name].tight if held(name) else _LOOSE
            return bool(np.linalg.norm(places[name] - target) > within)

        def slid(name: str, position: float) -> tuple[str, Place] | None:
            """Bring a handle to its position, unlocked; None if it is there."""
            target, lock = self._slides[name].at(position), _LOCKS[name]
            if not far(name, target):
                return None
            return (name, target) if info[f"privileged/{lock}_state"] else (lock, places[lock])

        goal, cube, drawer = self._goal, places["cube"], info["privileged/drawer_pos"][0]
        if self._stow and not self._in_drawer(cube, drawer, held("cube")):
            return slid("drawer", _OPEN) or ("cube", _INTO_DRAWER)
        if not self._stow and far("cube", self._cube_goal):
            return "cube", self._cube_goal
        for name in self._slides:
            if task := slid(name, goal[f"{name}_pos"]):
                return task
        for button, state in zip(self._tops, goal["button_states"], strict=True):
            if info[f"privileged/{button}_state"] != state:
                return button, places[button]
        return "cube", cube

    def _in_drawer(self, cube: Place, drawer: float, held: bool) -> bool:
        """OGBench's own ``_is_in_drawer``, for a cube that is let down in the middle."""
        x, y = _INTO_DRAWER[0], self._slides["drawer"].at(drawer)[1]
        aside = 0.02 if held else 0.037
        low, high = np.array([x - aside, y - 0.27, 0.0]), np.array([x + aside, y - 0.07, 0.09])
        return bool((low <= cube).all() and (cube <= high).all())

    def _move(
        self, name: str, target: Place, info: Info, leave: bool = False
    ) -> NDArray[np.float64]:
        """What the oracle does; where its object is in its place, it lets go of it and rises."""
        if name == "cube":
            info["privileged/target_block"] = 0
            info["privileged/target_block_pos"] = target
            info["privileged/target_block_yaw"] = np.zeros(1)
        elif name in self._slides:
            info[f"privileged/target_{name}_handle_pos"] = target
        else:
            state = info[f"privileged/{name}_state"]
            info["privileged/target_button"] = int(name[-1])
            info["privileged/target_button_top_pos"] = target
            info["privileged/target_button_state"] = state if leave else 1 - state
        action: NDArray[np.float64] = self._oracles[name].act.select_action(None, info)
        return action


def _flat_distance(a: Place, b: Place) -> float:
    return float(np.linalg.norm(a[:2] - b[:2]))


def _info(row: NDArray[np.float64]) -> Info:
    """An observation in the terms of OGBench's ``info``, which the oracles read."""
    # 6 joint positions and 6 velocities; effector's place, cos and sin of its yaw; gripper's
    # opening and contact; the cube's place, quaternion, cos and sin of its yaw; of each button the
    # state (one-hot), position and velocity; position and velocity of drawer and of window.
    info: Info = {
        "proprio/effector_pos": row[12:15] / _SCALE + _CENTRE,
        "proprio/effector_yaw": np.arctan2(row[16:17], row[15:16]),
        "proprio/gripper_opening": row[17:18] / 3.0,
        "proprio/gripper_contact": row[18:19],
        "privileged/block_0_pos": row[19:22] / _SCALE + _CENTRE,
        "privileged/block_0_yaw": np.arctan2(row[27:28], row[26:27]),
    }
    if len(row) > 28:  # the scene
        info |= {
            "privileged/button_0_state": int(row[29] > 0.5),
            "privileged/button_1_state": int(row[33] > 0.5),
            "privileged/drawer_pos": row[36:37] / 18.0,
            "privileged/window_pos": row[38:39] / 15.0,
        }
    return info
