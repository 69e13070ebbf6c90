"""Environments with a render state, events and prompts.

Add an environment: one file here, and one line in ``_HOMES`` where a short name is wanted.
The files are imported at first use, for each needs a simulator that need not be installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmrb_torchrl.envs.base import DemonstratedEnv, JudgedEnv, ResumableEnv

if TYPE_CHECKING:
    from vlmrb_torchrl.envs.doorkey import DoorKeyEnv
    from vlmrb_torchrl.envs.ogbench import OGBenchEnv

__all__ = ["DemonstratedEnv", "DoorKeyEnv", "JudgedEnv", "OGBenchEnv", "ResumableEnv"]

_HOMES = {"DoorKeyEnv": "doorkey", "OGBenchEnv": "ogbench"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
