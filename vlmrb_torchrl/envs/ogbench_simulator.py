"""How OGBench is imported: lazily, and without a graphics library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

INSTALL = "pip install 'vlmrb-torchrl[ogbench]'"


def simulator() -> Any:
    """The module of OGBench's games, whose import takes a second.

    OGBench imports dm_control, which looks for a graphics library once and for all, and fails
    where ``MUJOCO_GL`` names one that is not here; the games draw nothing, so it is told not to.

    Raises:
        ImportError: OGBench is not installed.
    """
    try:
        import_module("mujoco")  # its own choice of a graphics library is the user's
        with _without_graphics():
            return import_module("vlmrb_torchrl.envs.ogbench_games")
    except ModuleNotFoundError as error:
        raise ImportError(f"OGBench's tasks need OGBench ({error}): {INSTALL}") from error


@contextmanager
def _without_graphics() -> Iterator[None]:
    asked = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        yield
    finally:
        if asked is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = asked


def build_games(env_id: str, num_games: int) -> Any:
    """`Games` of one task, wherever this is called."""
    return simulator().Games(env_id, num_games)
