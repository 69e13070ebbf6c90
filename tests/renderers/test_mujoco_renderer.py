"""Frames redrawn from stored states are the frames that OGBench would have drawn."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from vlmrb_torchrl.envs import OGBenchEnv
from vlmrb_torchrl.renderers import mujoco as drawing
from vlmrb_torchrl.renderers.mujoco import MuJoCoRenderer

SCENE, CUBE = "scene-singletask-task{}-v0", "cube-single-singletask-task1-v0"
WIDTH, HEIGHT = 64, 48


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo's own Renderer draws by the graphics library used here, if there is one."""
    import mujoco.rendering.classic.gl_context as contexts

    try:
        library = drawing._graphics()
    except RuntimeError as error:
        pytest.skip(str(error))
    used = pytest.importorskip(f"mujoco.{library}").GLContext
    monkeypatch.setattr(contexts, "GLContext", used)


def stock(env: OGBenchEnv, samples: int = 0) -> Any:
    """OGBench's environment with MuJoCo's own Renderer, in its first episode."""
    size = {"width": WIDTH, "height": HEIGHT}
    game = gymnasium.make(env.env_id, disable_env_checker=True, **size).unwrapped
    game.reset(seed=env.episode_seed(0, 0))
    game.model.vis.quality.offsamples = samples
    return game


def shadows(on: bool) -> Callable[[Any], None]:
    def set_flag(scene: Any) -> None:
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = on

    return set_flag


@pytest.mark.usefixtures("contexts")
@pytest.mark.parametrize(
    ("task", "on", "samples", "every"),
    [
        (4, False, 0, 20),
        pytest.param(1, False, 0, 6, marks=pytest.mark.slow),
        pytest.param(3, True, 4, 40, marks=pytest.mark.slow),
    ],
)
def test_frames_equal_what_ogbench_draws(task: int, on: bool, samples: int, every: int) -> None:
    """A solved game: locks, drawer, window and the lit cube change on the way."""
    env = OGBenchEnv(SCENE.format(task), 1, seed=1)
    game, td, act = stock(env, samples), env.reset(), env.demonstrator()
    drawn, states, done, step = [], [], False, 0
    while not done:
        if step % every == 0:
            drawn.append(game.render(scene_callback=shadows(on)))
            states.append(td["render_state"])
        step += 1
        td = env.step(act(td))
        done = game.step(td["action"][0].numpy())[2]
        td = td["next"]
    drawn.append(game.render(scene_callback=shadows(on)))
    states.append(td["render_state"])
    frames = env.renderer(WIDTH, HEIGHT, shadows=on, samples=samples)(torch.cat(states))
    assert np.array_equal(frames.permute(0, 2, 3, 1), np.stack(drawn))
    assert len(frames.flatten(1).unique(dim=0)) == len(frames)


class Ball:
    """A world without a camera of its own; its state is where the ball is."""

    def __init__(self) -> None:
        xml = (
            "<mujoco><worldbody><light pos='0 0 3'/><geom type='plane' size='1 1 1'/><body>"
            "<freejoint/><geom size='.2' rgba='1 0 0 1'/></body></worldbody></mujoco>"
        )
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)

    def pose(self, state: Any) -> None:
        self.data.qpos[:3] = state
        mujoco.mj_forward(self.model, self.data)


@pytest.mark.usefixtures("contexts")
@pytest.mark.parametrize(("on", "samples"), [(False, 0), (True, 4)])
def test_frames_equal_those_of_mujocos_renderer_with_its_free_camera(
    on: bool, samples: int
) -> None:
    world, states = Ball(), torch.tensor([[0.0, 0.0, 0.5], [0.4, 0.0, 0.3]])
    options = {"shadows": on, "samples": samples}
    frames = MuJoCoRenderer(Ball, WIDTH, HEIGHT, camera=None, **options)(states)
    world.model.vis.quality.offsamples = samples
    with mujoco.Renderer(world.model, HEIGHT, WIDTH) as theirs:
        for state, frame in zip(states, frames, strict=True):
            world.pose(state.numpy())
            theirs.update_scene(world.data)
            shadows(on)(theirs.scene)
            assert np.array_equal(frame.permute(1, 2, 0), theirs.render())
    assert not torch.equal(*frames)


@pytest.mark.slow
@pytest.mark.usefixtures("contexts")
def test_cube_is_drawn_where_the_state_says() -> None:
    """OGBench's cube task, alone, draws bodies 2 ms late: one physics step, made up for here."""
    env = OGBenchEnv(CUBE, 1, seed=1)
    game, rollout = stock(env), env.rollout(5, env.demonstrator())
    for action in rollout["action"][0].numpy():
        game.step(action)
    mujoco.mj_forward(game.model, game.data)
    frame = env.renderer(WIDTH, HEIGHT)(rollout["next", "render_state"][0, -1])
    assert np.array_equal(frame.permute(1, 2, 0), game.render(scene_callback=shadows(False)))


@pytest.mark.usefixtures("contexts")
def test_frames_depend_on_the_state_alone() -> None:
    """Not on what was drawn before, nor on the pickled copy or the thread that draws."""
    env = OGBenchEnv(CUBE, 2)
    states = torch.cat(
        [env.rollout(3)["render_state"], torch.zeros(2, 1, 248, dtype=torch.uint8)], 1
    )
    render = env.renderer(WIDTH, HEIGHT)
    frames = render(states)
    assert frames.shape == (2, 4, 3, HEIGHT, WIDTH)
    assert frames.dtype == torch.uint8
    assert torch.equal(render(states[1, 2]), frames[1, 2])
    assert render(states[:0]).shape == (0, 4, 3, HEIGHT, WIDTH)
    data = pickle.dumps(render)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)(states.flip(1)).flip(1), frames)
    seen: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: seen.append(render(states))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(other, frames) for other in seen)
    assert len(seen) == 2
    render.close()
    assert torch.equal(render(states), frames)
    with pytest.raises(ValueError, match=r"uint8 \[298\]: pass uint8 \[\*B, 248\]"):
        render(torch.zeros(2, 298, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"float32 \[248\]"):
        render(torch.zeros(2, 248))
    with pytest.raises(ValueError, match=r"camera is back: .* front, front_pixels"):
        env.renderer(camera="back")(states)


@pytest.fixture
def _tried_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in drawing._VARIABLES:  # MuJoCo sets one once imported
        monkeypatch.delenv(name, raising=False)
    trials = drawing._problem
    trials.cache_clear()
    yield
    trials.cache_clear()


Settings = dict[str, str]
DEVICE, PLATFORM = {"MUJOCO_EGL_DEVICE_ID": "99"}, {"PYOPENGL_PLATFORM": "glx"}


@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.parametrize(
    ("settings", "works", "outcome"),
    [
        ({}, lambda library, left: True, "egl"),
        ({}, lambda library, left: library == "osmesa", "osmesa"),
        ({"MUJOCO_GL": "osmesa"}, lambda library, left: True, "osmesa"),
        ({"MUJOCO_GL": "disabled"}, lambda library, left: True, "egl"),
        ({}, lambda library, left: False, "apt-get install libegl1"),
        ({"MUJOCO_GL": "egl"}, lambda library, left: False, "egl: broken.*apt-get install"),
        (
            {"MUJOCO_GL": "egl"},
            lambda library, left: library == "osmesa",
            "unset MUJOCO_GL=egl, without which osmesa works",
        ),
        (
            DEVICE | {"PYOPENGL_PLATFORM": "egl"},
            lambda library, left: not left,
            "unset MUJOCO_EGL_DEVICE_ID=99, without which egl works",
        ),
        (
            DEVICE | PLATFORM,
            lambda library, left: not left,
            "unset PYOPENGL_PLATFORM=glx and MUJOCO_EGL_DEVICE_ID=99, without which egl works",
        ),
    ],
)
def test_library_that_works_draws_or_one_line_says_what_to_unset_or_install(
    settings: Settings,
    works: Callable[[str, Settings], bool],
    outcome: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``works`` is told the settings but those that name the library itself."""

    def problem(library: str, left: tuple[tuple[str, str], ...]) -> str | None:
        return None if works(library, dict(left)) else "broken"

    monkeypatch.setattr(drawing, "_problem", problem)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if outcome in ("egl", "osmesa"):
        assert drawing._graphics() == outcome
        return
    with pytest.raises(RuntimeError, match=outcome) as refusal:
        drawing._graphics()
    assert "\n" not in str(refusal.value)
    assert ("install" in str(refusal.value)) == ("install" in outcome)


@pytest.mark.usefixtures("_tried_anew")
def test_library_that_hangs_or_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    run = drawing.subprocess.run
    monkeypatch.setattr(
        drawing.subprocess, "run", lambda command, **how: tried.append(how) or run(command, **how)
    )
    monkeypatch.setattr(drawing, "_TRIAL", "import threading; threading.Event().wait()")
    monkeypatch.setattr(drawing, "_TRIAL_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"egl: nothing drawn in 0\.2 s"):
            drawing._graphics()
    monkeypatch.setattr(drawing, "_TRIAL", "raise OSError('no\\nlibrary')")
    monkeypatch.setattr(drawing, "_TRIAL_SECONDS", 60)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    with pytest.raises(RuntimeError, match="egl: library"):
        drawing._graphics()
    environments = [how["env"].get("MUJOCO_EGL_DEVICE_ID") for how in tried]
    assert environments == [None, None, "99", "99"]  # egl and osmesa, each once


@pytest.mark.slow
@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.skipif(find_library("OSMesa") is None, reason="libosmesa6 is not installed")
def test_egl_without_a_driver_is_passed_over() -> None:
    program = "from vlmrb_torchrl.renderers import mujoco as m; print(m._graphics())"
    environment = os.environ | {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    command = [sys.executable, "-c", program]
    drawn = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert drawn.stdout.split()[-1] == "osmesa"


@pytest.mark.slow
@pytest.mark.usefixtures("_tried_anew")
def test_variable_that_keeps_a_library_from_working_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What there is need not be installed; once it is unset, the same process draws."""
    if drawing._problem("egl", ()) is not None or find_library("OSMesa") is not None:
        pytest.skip("needs EGL, and nothing else")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    with pytest.raises(RuntimeError, match="unset MUJOCO_EGL_DEVICE_ID=99"):
        drawing._graphics()
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
    assert drawing._graphics() == "egl"
