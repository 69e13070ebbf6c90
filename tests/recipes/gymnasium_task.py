"""A task of one's own, in one file: any Gymnasium environment with continuous actions.

    python -m recipes.sac --env tests.recipes.gymnasium_task.Gymnasium --env.id HalfCheetah-v5 \
        --replay Uniform
"""

from __future__ import annotations

from torchrl.envs import (
    ActionScaling,
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    SerialEnv,
    TransformedEnv,
)

from recipes.tasks import Task

HELD_OUT = 2**30  # training and evaluation start from different seeds


class Gymnasium(Task):
    """A Gymnasium environment that observes a vector; it has no judge, so its return is measured.

    Args:
        id: Name that Gymnasium knows.
    """

    def __init__(self, id: str = "InvertedPendulum-v5") -> None:
        self.id = id
        self.name = id.lower()

    def make_one(self) -> EnvBase:
        """Build one environment: float32 observations, actions in [-1, 1]."""
        return TransformedEnv(GymEnv(self.id), Compose(DoubleToFloat(), ActionScaling()))

    def make(self, num_envs: int, seed: int, *, held_out: bool = False) -> EnvBase:
        """Build ``num_envs`` of them, stepped in turn."""
        envs = SerialEnv(num_envs, self.make_one)
        envs.set_seed(seed + held_out * HELD_OUT)
        return envs
