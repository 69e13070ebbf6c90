"""Environments with a render state, events and prompts, one file each.

Their simulators need not be installed: they are imported when an environment is built.
"""

from vlmrb_torchrl.envs.base import DemonstratedEnv, JudgedEnv, ResumableEnv
from vlmrb_torchrl.envs.doorkey import DoorKeyEnv
from vlmrb_torchrl.envs.ogbench import OGBenchEnv

__all__ = ["DemonstratedEnv", "DoorKeyEnv", "JudgedEnv", "OGBenchEnv", "ResumableEnv"]
