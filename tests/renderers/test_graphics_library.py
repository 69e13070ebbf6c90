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
    remedy = "unset MUJOCO_GL=egl" if find_library("OSMesa") else "apt-get install libegl1"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    with pytest.raises(RuntimeError, match=remedy) as refusal:
        drawing._graphics()
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.parametrize(
    "settings",
    [
        {"MUJOCO_EGL_DEVICE_ID": "99", "PYOPENGL_PLATFORM": "egl"},
        {"MUJOCO_EGL_DEVICE_ID": "99", "PYOPENGL_PLATFORM": "glx"},
    ],
    ids=["device", "both"],
)
def test_variable_that_keeps_a_library_from_working_is_named(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is need not be installed; once it is unset, the same process draws."""
    for name in drawing._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if drawing._problem("egl", ()) is not None or find_library("OSMesa") is not None:
        pytest.skip("needs EGL, and nothing else")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    wrong = " and ".join(f"{n}={settings[n]}" for n in drawing._VARIABLES if n in settings)
    wrong = wrong.removeprefix("PYOPENGL_PLATFORM=egl and ")
    with pytest.raises(RuntimeError, match=f"unset {wrong}, without which egl works") as refusal:
        drawing._graphics()
    assert "\n" not in str(refusal.value)
    assert "install" not in str(refusal.value)
    for name in settings:
        monkeypatch.delenv(name)
    assert drawing._graphics() == "egl"


@pytest.mark.usefixtures("_tried_anew")
def test_library_that_hangs_or_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    run = drawing.subprocess.run
    monkeypatch.setattr(
        drawing.subprocess, "run", lambda command, **how: tried.append(how) or run(command, **how)
    )
    monkeypatch.setenv("MUJOCO_GL", "egl")
    for name in ("PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):  # MuJoCo sets one once imported
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(drawing, "_TRIAL", "import threading; threading.Event().wait()")
    monkeypatch.setattr(drawing, "_TRIAL_SECONDS", 0.2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"egl: nothing drawn in 0\.2 s"):
            drawing._graphics()
    assert len(tried) == 2  # and OSMesa: it might work without MUJOCO_GL


@pytest.mark.parametrize("arguments", [{"width": 0}, {"height": -1}, {"samples": -1}])
def test_impossible_arguments_are_refused(arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        MuJoCoRenderer(lambda: None, **arguments)  # type: ignore[arg-type, return-value]
