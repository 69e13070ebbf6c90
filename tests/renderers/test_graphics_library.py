"""The graphics library that MuJoCo draws with: EGL, else OSMesa, else a line that helps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from vlmrb_torchrl.renderers import mujoco as drawing
from vlmrb_torchrl.renderers.mujoco import MuJoCoRenderer


@pytest.fixture
def _tried_anew() -> Iterator[None]:
    drawing._problem.cache_clear()
    yield
    drawing._problem.cache_clear()


DRAW = """
import sys
import torch
from vlmrb_torchrl.envs import OGBenchEnv
from vlmrb_torchrl.renderers import mujoco as drawing

env = OGBenchEnv("scene-singletask-task1-v0", 1)
torch.save(env.renderer(64, 48)(env.reset()["render_state"]), sys.argv[1])
print(drawing._graphics())
"""


@pytest.mark.skipif(find_library("OSMesa") is None, reason="libosmesa6 is not installed")
def test_library_that_fails_is_passed_over(tmp_path: Path) -> None:
    """EGL without any vendor's driver: OSMesa draws."""
    chosen = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment["__EGL_VENDOR_LIBRARY_DIRS"] = "/nonexistent"
    command = [sys.executable, "-c", DRAW, str(tmp_path / "frame")]
    drawn = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert drawn.stdout.split()[-1] == "osmesa"
    frame = torch.load(tmp_path / "frame", weights_only=True)
    assert frame.shape == (1, 3, 48, 64)
    assert frame.float().std() > 30  # a scene, not one colour


@pytest.mark.usefixtures("_tried_anew")
def test_no_library_at_all_is_one_line_that_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    with pytest.raises(RuntimeError, match=r"egl: .*apt-get install libegl1") as refusal:
        drawing._graphics()
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("_tried_anew")
def test_library_that_hangs_or_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    run = drawing.subprocess.run
    monkeypatch.setattr(
        drawing.subprocess, "run", lambda command, **how: tried.append(how) or run(command, **how)
    )
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(drawing, "_TRIAL", "import threading; threading.Event().wait()")
    monkeypatch.setattr(drawing, "_TRIAL_SECONDS", 0.2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"egl: nothing drawn in 0\.2 s"):
            drawing._graphics()
    assert len(tried) == 1


@pytest.mark.parametrize("arguments", [{"width": 0}, {"height": -1}, {"samples": -1}])
def test_impossible_arguments_are_refused(arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        MuJoCoRenderer(lambda: None, **arguments)  # type: ignore[arg-type, return-value]
