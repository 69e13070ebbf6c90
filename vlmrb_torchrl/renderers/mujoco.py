"""MuJoCo frames from stored states: without a window, on the GPU or on the CPU.

What a picture costs on a CPU is its options: shadows first, then the samples of a pixel, hence the
defaults here; ``python -m recipes.benchmarks.scene`` times them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrb_torchrl.checks import is_whole, require, shown

_MOST = 1 << 13  # pixels of an edge; graphics libraries draw no more
_MAX_GEOMS = 10_000  # as in mujoco.Renderer
_TRIAL = """
import mujoco, mujoco.{0} as graphics
context = graphics.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 100)
"""
_TRIAL_SECONDS = 60.0
_VARIABLES = ("PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "MUJOCO_GL")
"""What may be set so that a library that is here does not work."""


class Stage(Protocol):
    """A MuJoCo world that can be put into a stored state.

    Attributes:
        model: ``mujoco.MjModel``, this stage's own: the renderer sets its picture's quality.
        data: ``mujoco.MjData``, posed.
    """

    model: Any
    data: Any

    def pose(self, state: NDArray[Any]) -> None:
        """Put the world into one state."""
        ...


class MuJoCoRenderer:
    """Frames of a MuJoCo world, equal byte for byte to ``mujoco.Renderer``'s with these options.

    B: any leading dimensions, S: shape of a state.

    It may be called from several threads, one of them drawing at a time. It pickles without what
    it has opened: the world is built, and the graphics library looked for, at the first frame.
    ``MUJOCO_GL`` (``egl``, ``osmesa`` or ``glfw``) chooses the library; else EGL is tried, which
    uses a GPU where there is one, and OSMesa where that fails.

    Args:
        stage: Builds the world; called once, wherever the frames are drawn.
        width: Of a frame, in pixels.
        height: Of a frame, in pixels.
        camera: Name of one of the model's cameras; None: a free one, as in MuJoCo's viewer.
        shadows: Draw shadows.
        samples: For each pixel, to smooth edges; 0 and 1 do not, MuJoCo's own default is 4.

    Attributes:
        device: Where it wants its states, whatever the scorer's device: on the CPU.

    Raises:
        ValueError: A size that is not positive, or (at the first frame) an unknown camera.

    Example:
        >>> renderer = OGBenchEnv("scene-singletask-task1-v0").renderer(width=64, height=48)
        >>> renderer(torch.zeros(5, 298, dtype=torch.uint8)).shape
        torch.Size([5, 3, 48, 64])
    """

    device = torch.device("cpu")
    _canvas: _Canvas | None

    def __init__(
        self,
        stage: Callable[[], Stage],
        width: int = 200,
        height: int = 200,
        *,
        camera: str | None = "front",
        shadows: bool = False,
        samples: int = 0,
    ) -> None:
        if not callable(stage):
            raise TypeError(f"stage={shown(stage)}: pass a function that builds the world.")
        for name, value in (("width", width), ("height", height)):
            require(is_whole(value, 1, _MOST), name, value, f"take 1 to {_MOST} pixels")
        require(is_whole(samples, 0, _MOST), "samples", samples, f"take 0 to {_MOST}")
        named = camera is None or (isinstance(camera, str) and bool(camera))
        require(named, "camera", camera, "name one of the model's, or None")
        require(isinstance(shadows, bool), "shadows", shadows, "say True or False")
        self.stage, self.width, self.height = stage, width, height
        self.camera, self.shadows, self.samples = camera, shadows, samples
        self._forget()

    def __call__(self, render_state: Tensor) -> Tensor:
        """Draw states ``[*B, S]``: RGB, uint8 ``[*B, 3, height, width]``, on their device.

        Raises:
            ValueError: It is no tensor of states.
            RuntimeError: No graphics library works here; the text names what to install or unset.
        """
        batched = isinstance(render_state, Tensor) and render_state.ndim > 0
        require(batched, "render_state", render_state, "pass a tensor [*B, S]")
        states = render_state.reshape(-1, render_state.shape[-1]).contiguous().cpu().numpy()
        frames = np.empty((len(states), self.height, self.width, 3), np.uint8)
        with self._lock:
            if len(states) and self._canvas is None:
                self._canvas = _Canvas(self)
            if self._canvas is not None:
                self._canvas.draw(states, frames)
        pictures = torch.from_numpy(frames).movedim(-1, 1).contiguous()
        return pictures.to(render_state.device).view(*render_state.shape[:-1], *pictures.shape[1:])

    def close(self) -> None:
        """Let go of the world and the graphics library; the next frame opens them again."""
        with self._lock:
            canvas, self._canvas = self._canvas, None
            if canvas is not None:
                canvas.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # not built to the end
            self.close()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._canvas = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_canvas")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _Canvas:
    """A posed world and a graphics context, which is current only while it draws."""

    def __init__(self, options: MuJoCoRenderer) -> None:
        graphics = import_module(f"mujoco.{_graphics()}")
        import mujoco

        self._stage = options.stage()
        model, width, height = self._stage.model, options.width, options.height
        self._camera = mujoco.MjvCamera()
        if options.camera is None:
            mujoco.mjv_defaultFreeCamera(model, self._camera)
        else:
            self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self._camera.fixedcamid = _camera(model, options.camera)
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.offsamples = options.samples
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = options.shadows
        self._option, self._size = mujoco.MjvOption(), mujoco.MjrRect(0, 0, width, height)
        self._gl = graphics.GLContext(width, height)
        with self._gl.as_current():
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def draw(self, states: NDArray[Any], frames: NDArray[np.uint8]) -> None:
        """Fill ``frames`` ``[N, H, W, 3]``."""
        import mujoco

        model, data = self._stage.model, self._stage.data
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        with self._gl.as_current():
            for state, frame in zip(states, frames, strict=True):
                self._stage.pose(state)
                mujoco.mjv_updateScene(
                    model, data, self._option, None, self._camera, everything, self._scene
                )
                mujoco.mjr_render(self._size, self._scene, self._context)
                mujoco.mjr_readPixels(frame, None, self._size, self._context)
                frame[:] = frame[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        with self._gl.as_current():
            self._context.free()
        self._gl.free()


def _camera(model: Any, name: str) -> int:
    cameras = [model.camera(i).name for i in range(model.ncam)]
    require(name in cameras, "camera", name, f"the model has {', '.join(cameras)}")
    return cameras.index(name)


def _graphics() -> str:
    """The first graphics library that works: ``MUJOCO_GL``'s, else EGL, else OSMesa."""
    settings = {name: value for name in _VARIABLES if (value := os.environ.get(name))}
    problems: list[str] = []
    for unset in ((), *((name,) for name in settings), tuple(settings)):
        kept = {name: value for name, value in settings.items() if name not in unset}
        asked = kept.get("MUJOCO_GL", "").lower()
        for library in (asked,) if asked in ("egl", "osmesa", "glfw") else ("egl", "osmesa"):
            # A variable that names the library itself, as its import leaves one, changes nothing.
            problem = _problem(library, tuple(s for s in kept.items() if s[1].lower() != library))
            if problem is None and not unset:
                return library
            if problem is None:
                names = " and ".join(f"{name}={settings[name]}" for name in unset)
                raise _unable(problems, f"unset {names}, without which {library} works")
            if not unset:
                problems.append(f"{library}: {problem}")
    raise _unable(problems, "apt-get install libegl1 libgl1 libgl1-mesa-dri (or libosmesa6)")


def _unable(problems: list[str], remedy: str) -> RuntimeError:
    return RuntimeError(f"MuJoCo cannot draw here ({'; '.join(problems)}): {remedy}.")


@lru_cache
def _problem(library: str, settings: tuple[tuple[str, str], ...]) -> str | None:
    """Why a graphics library does not work here, in one line; None if it does."""
    # Tried in a process of its own: what fails leaves behind what no other works with.
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _TRIAL.format(library)],
            capture_output=True,
            text=True,
            check=False,
            env=environment | dict(settings),
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"nothing drawn in {_TRIAL_SECONDS} s"
    if trial.returncode == 0:
        return None
    return (trial.stderr.strip().splitlines() or ["it crashes"])[-1]
