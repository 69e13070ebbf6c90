"""Frames redrawn from stored states are the frames that OGBench would have drawn."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
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


@pytest.fixture(autouse=True)
def _draws_here() -> None:
    try:
        drawing._graphics()
    except RuntimeError as error:
        pytest.skip(str(error))


def stock(env_id: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """OGBench's environment with MuJoCo's own Renderer, on the graphics library used here."""
    import mujoco.rendering.classic.gl_context as contexts

    used = pytest.importorskip(f"mujoco.{drawing._graphics()}").GLContext
    monkeypatch.setattr(contexts, "GLContext", used)
    game = gymnasium.make(env_id, width=WIDTH, height=HEIGHT, disable_env_checker=True).unwrapped
    game.reset(seed=0)
    game.model.vis.quality.offsamples = samples
    return game


def shadows(on: bool) -> Callable[[Any], None]:
    def set_flag(scene: Any) -> None:
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = on

    return set_flag


@pytest.mark.parametrize(
    ("task", "on", "samples", "every"), [(1, False, 0, 6), (4, False, 0, 10), (3, True, 4, 40)]
)
def test_frames_equal_what_ogbench_draws(
    task: int, on: bool, samples: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solved game: locks, drawer, window and the lit cube change on the way."""
    env_id = SCENE.format(task)
    env, game = OGBenchEnv(env_id, 1, seed=1), stock(env_id, samples, monkeypatch)
    game.reset(seed=env.episode_seed(0, 0))
    td, act = env.reset(), env.demonstrator()
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


def test_model_without_cameras_is_drawn_by_mujoco_s_free_camera(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mujoco.rendering.classic.gl_context as contexts

    used = pytest.importorskip(f"mujoco.{drawing._graphics()}").GLContext
    monkeypatch.setattr(contexts, "GLContext", used)
    world, states = Ball(), torch.tensor([[0.0, 0.0, 0.5], [0.4, 0.0, 0.3]])
    frames = MuJoCoRenderer(Ball, WIDTH, HEIGHT, camera=None)(states)
    world.model.vis.quality.offsamples = 0
    with mujoco.Renderer(world.model, HEIGHT, WIDTH) as theirs:
        for state, frame in zip(states, frames, strict=True):
            world.pose(state.numpy())
            theirs.update_scene(world.data)
            shadows(False)(theirs.scene)
            assert np.array_equal(frame.permute(1, 2, 0), theirs.render())
    assert not torch.equal(*frames)


def test_cube_is_drawn_where_the_state_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """OGBench's cube task, alone, draws bodies 2 ms late: one physics step, made up for here."""
    env, game = OGBenchEnv(CUBE, 1, seed=1), stock(CUBE, 0, monkeypatch)
    game.reset(seed=env.episode_seed(0, 0))
    rollout = env.rollout(5, env.demonstrator())
    for action in rollout["action"][0].numpy():
        game.step(action)
    mujoco.mj_forward(game.model, game.data)
    frame = env.renderer(WIDTH, HEIGHT)(rollout["next", "render_state"][0, -1])
    assert np.array_equal(frame.permute(1, 2, 0), game.render(scene_callback=shadows(False)))


def test_leading_dimensions_are_kept_and_none_draws_nothing() -> None:
    env = OGBenchEnv(CUBE, 2)
    states, render = env.rollout(3)["render_state"], env.renderer(WIDTH, HEIGHT)
    frames = render(states)
    assert frames.shape == (2, 3, 3, HEIGHT, WIDTH)
    assert frames.dtype == torch.uint8
    assert torch.equal(render(states[1, 2]), frames[1, 2])
    assert render(states[:0]).shape == (0, 3, 3, HEIGHT, WIDTH)


def test_frames_depend_on_the_state_alone() -> None:
    """Not on what was drawn before, nor on the pickled copy or the thread that draws."""
    env = OGBenchEnv(SCENE.format(2), 1)
    states = env.rollout(4)["render_state"][0]
    states = torch.cat([torch.zeros_like(states[:1]), states])
    render = env.renderer(WIDTH, HEIGHT)
    frames = render(states)
    data = pickle.dumps(render)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data)(states.flip(0)).flip(0), frames)
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


def test_unknown_camera_is_refused_with_those_that_there_are() -> None:
    env = OGBenchEnv(CUBE, 1)
    with pytest.raises(ValueError, match=r"camera='back'.* front, front_pixels"):
        env.renderer(camera="back")(env.reset()["render_state"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(2, 248), r"float32 \[248\]"),
        (torch.zeros(2, 298, dtype=torch.uint8), r"uint8 \[298\]: pass uint8 \[\*B, 248\]"),
    ],
)
def test_what_is_no_render_state_is_refused(state: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OGBenchEnv(CUBE, 1).renderer(WIDTH, HEIGHT)(state)
