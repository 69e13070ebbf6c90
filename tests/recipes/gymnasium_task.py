"""A task of one's own, in one file: a Gymnasium environment with vectors in and bounded actions.

    python -m recipes.sac --env tests.recipes.gymnasium_task.Gymnasium --env.id HalfCheetah-v5 \
        --replay Uniform

MuJoCo's tasks can be judged, too: their physics are redrawn from positions and velocities.

    … --env.camera track --env.success_reward 3 --replay VLMGuided \
        --scoring.scorer PrivilegedScorer --scoring.scorer.event_names '[success]' \
        --scoring.scorer.events '[success]'
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import DtypeObservation, RescaleAction
from torchrl.envs import EnvBase, GymWrapper, SerialEnv

from recipes.tasks import Task
from vlmrb_torchrl import keys
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.renderers import MuJoCoRenderer, Renderer

HELD_OUT = 2**31  # training, demonstrations (from 2**30) and evaluation begin with different seeds


class Judged(gymnasium.Wrapper):
    """Observes beside the agent's vector what a judge needs: the physics, and what happened."""

    def __init__(self, env: gymnasium.Env, success_reward: float) -> None:
        super().__init__(env)
        self.success_reward = success_reward
        model = self.unwrapped.model
        self.observation_space = Dict(
            {
                "observation": env.observation_space,
                keys.RENDER_STATE: Box(-np.inf, np.inf, (model.nq + model.nv,), np.float64),
                keys.EVENTS: Box(0, 1, (1,), np.bool_),
            }
        )

    def reset(self, **arguments: Any) -> Any:
        observation, info = self.env.reset(**arguments)
        return self._beside(observation, success=False), info

    def step(self, action: Any) -> Any:
        observation, reward, *ends = self.env.step(action)
        return self._beside(observation, reward >= self.success_reward), reward, *ends

    def _beside(self, observation: Any, success: bool) -> dict[str, Any]:
        data = self.unwrapped.data
        state = np.concatenate([data.qpos, data.qvel])
        return {
            "observation": observation,
            keys.RENDER_STATE: state,
            keys.EVENTS: np.array([success], np.bool_),
        }


class Physics:
    """A world for `MuJoCoRenderer`, put into the states that `Judged` writes."""

    def __init__(self, id: str) -> None:
        self._env = gymnasium.make(id).unwrapped
        self.model, self.data = self._env.model, self._env.data

    def pose(self, state: Any) -> None:
        self._env.set_state(*np.split(state, [self.model.nq]))


class Gymnasium(Task):
    """A Gymnasium environment that observes a vector and takes bounded actions.

    Args:
        id: Name that Gymnasium knows.
        success_reward: A step of a MuJoCo task that pays this much is success; null: success is
            not known, the return is measured.
        camera: The MuJoCo model's camera that a judge looks through, such as ``track``; null: a
            free one.
    """

    event_names = ("success",)

    def __init__(
        self,
        id: str = "InvertedPendulum-v5",
        success_reward: float | None = None,
        camera: str | None = None,
    ) -> None:
        try:
            self.is_mujoco = hasattr(gymnasium.make(id).unwrapped, "set_state")
        except gymnasium.error.Error as error:
            raise ConfigError(f"env.id is {id}: {error}") from error
        if success_reward is not None and not self.is_mujoco:
            raise ConfigError(f"env.success_reward is {success_reward}: {id} is not MuJoCo's")
        self.id, self.success_reward, self.camera = id, success_reward, camera
        self.success_event = None if success_reward is None else "success"
        self.name = id.lower()

    def make_one(self) -> EnvBase:
        """Build one environment: float32 observations, actions in [-1, 1]."""
        # Gymnasium's wrappers: TorchRL's transforms of one step of one environment are slower.
        env = RescaleAction(gymnasium.make(self.id), np.float32(-1), np.float32(1))
        env = DtypeObservation(env, np.float32)
        if self.is_mujoco:  # whose render state stays as exact as it is
            enough = math.inf if self.success_reward is None else self.success_reward
            env = Judged(env, enough)
        return GymWrapper(env)

    def make(self, num_envs: int, seed: int, *, held_out: bool = False) -> EnvBase:
        """Build ``num_envs`` of them, stepped in turn."""
        envs = SerialEnv(num_envs, self.make_one)
        envs.set_seed(seed + held_out * HELD_OUT)
        return envs

    def renderer(self) -> Renderer | None:
        """Draw MuJoCo's tasks from their states; others have no renderer here."""
        if not self.is_mujoco:
            return None
        return MuJoCoRenderer(partial(Physics, self.id), camera=self.camera)
