"""OGBench's tasks in a batch are OGBench's tasks, step for step."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict

from vlmrb_torchrl.envs import OGBenchEnv, ogbench
from vlmrb_torchrl.scorers import PrivilegedScorer

SCENE, CUBE = "scene-singletask-task{}-v0", "cube-single-singletask-task1-v0"
JUDGE = Path(__file__).parents[2] / "recipes/configs/ogbench/scene_privileged.yaml"
SUBTASKS = ("cube", "drawer_lock", "window_lock", "drawer", "window")
ASKED = {  # what each of the scene's tasks has to be done, undone things among them
    1: ("drawer", "window"),
    2: ("drawer", "window", "drawer_lock", "window_lock"),
    3: ("cube", "window_lock", "drawer", "window"),
    4: ("cube", "drawer_lock", "drawer"),
    5: ("cube", "window", "drawer", "drawer_lock", "window_lock"),
}


def asked(env_id: str) -> tuple[str, ...]:
    return ("cube",) if env_id == CUBE else ASKED[int(env_id[len("scene-singletask-task")])]


@cache
def demonstrations(env_id: str, noise: float = 0.0, **arguments: Any) -> TensorDict:
    """Two games, ``[2, steps]``, until both are done; the second's actions are noisy."""
    env = OGBenchEnv(env_id, 2, seed=5, **arguments)
    act = env.demonstrator()

    def policy(td: TensorDict) -> TensorDict:
        action = act(td)["action"]
        action[1] += noise * torch.randn(5)
        return td.set("action", action.clamp(-1, 1))

    torch.manual_seed(0)
    return env.rollout(400, policy, break_when_any_done=False, break_when_all_done=True)


def end_of(td: TensorDict, game: int) -> int:
    return int(td["next", "done"][game].flatten().nonzero()[0])


def successes(game: Any) -> np.ndarray:
    """OGBench's own verdict on each subtask, in its order."""
    found = game.unwrapped._compute_successes()
    flat = found if isinstance(found, list) else [*found[0], *found[1], *found[2:]]
    return np.array(flat, bool)


TASKS = [SCENE.format(5), CUBE]
TASKS += [pytest.param(SCENE.format(i), marks=pytest.mark.slow) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("env_id", TASKS)
def test_every_step_equals_stock_ogbench(env_id: str) -> None:
    """Observation, reward, ends, success and state, over a reset, at skilled and random play.

    Locks, of which the games share the joints, are set in one and open in another. The limit of
    steps is where the first game succeeds, so that it ends both ways at once.
    """
    pytest.importorskip("ogbench")  # which registers its tasks
    limit = end_of(demonstrations(env_id), 0) + 1
    env = OGBenchEnv(env_id, 2, max_steps=limit, seed=5)
    act, rng, td, steps = env.demonstrator(), np.random.default_rng(0), env.reset(), []
    for step in range(limit + 12):
        td = act(td)
        if step % 3:
            td["action"][1] = torch.from_numpy(rng.uniform(-1, 1, 5))
        outcome, td = env.step_and_maybe_reset(td)
        steps.append((outcome.clone(), td.clone()))
    stock: Any = gymnasium.make(env_id, max_episode_steps=limit, disable_env_checker=True)
    ends = []
    for i in range(2):
        episode = 0
        stock.reset(seed=env.episode_seed(i, 0))
        # A subtask's event comes once in an episode: not done yet, or to be undone and redone.
        done = successes(stock)
        due = ~done | (env_id != CUBE and np.isin(SUBTASKS, asked(env_id)))
        for step, (before, following) in enumerate(steps):
            where, after = f"game {i}, step {step}", before["next"][i]
            seen, reward, terminated, truncated, info = stock.step(before["action"][i].numpy())
            assert np.array_equal(after["observation"], seen.astype(np.float32)), where
            assert after["reward"].item() == reward, where
            flags = [bool(terminated), truncated, bool(terminated or truncated)]
            assert [after[e].item() for e in ("terminated", "truncated", "done")] == flags, where
            now = successes(stock)
            completed = due & now & ~done
            assert after["events"].tolist() == [info["success"], *completed], where
            due, done = due & ~completed, now
            data = stock.unwrapped.data
            locks = getattr(stock.unwrapped, "_cur_button_states", np.zeros(0))
            parts = (data.qpos, data.qvel.astype(np.float32), locks.astype(np.uint8))
            packed = b"".join(part.tobytes() for part in parts)
            assert after["render_state"].numpy().tobytes() == packed, where
            if flags[2]:
                ends.append((i, *flags[:2]))
                episode += 1
                seen, _ = stock.reset(seed=env.episode_seed(i, episode))
                assert np.array_equal(following["observation"][i], seen.astype(np.float32)), where
                done = successes(stock)
                due = ~done | (env_id != CUBE and np.isin(SUBTASKS, asked(env_id)))
    assert ends == [(0, True, True), (1, False, True)]


@pytest.mark.parametrize("env_id", TASKS)
def test_demonstrator_solves_every_task_and_the_privileged_judge_sees_each_subtask(
    env_id: str,
) -> None:
    """Every event that may happen does, by the task's definition; success comes last and ends.

    The judge is as it is configured for all five tasks, and clips are of a step each.
    """
    env_id_asked, td = asked(env_id), demonstrations(env_id, noise=0.3 if env_id == CUBE else 0.0)
    env = OGBenchEnv(env_id, 1)
    for game in range(2):
        end = end_of(td, game)
        events = td["next", "events"][game, : end + 1]
        names = [env.event_names[column] for column in events.nonzero()[:, 1].tolist()]
        assert names[-1] == "success"
        assert sorted(names) == sorted({"success", *env_id_asked})
        assert td["next", "terminated"][game, end]
        assert td["next", "reward"][game, end] == 0  # every subtask is done
        if env_id != CUBE:
            settings = yaml.safe_load(JUDGE.read_text())["scoring"]["scorer"]["init_args"]
            assert settings["event_names"] == list(env.event_names)
            judged = PrivilegedScorer(**settings)(TensorDict({"events": events}, [end + 1]))
            assert torch.equal(judged["score"] == 1, events.any(1))


@pytest.mark.parametrize(("task", "counts"), [(1, False), (2, True), (3, False), (5, True)])
def test_a_lock_undone_and_redone_is_progress_only_where_something_was_locked(
    task: int, counts: bool
) -> None:
    env = OGBenchEnv(SCENE.format(task), 1, seed=1)
    env.reset()
    game, still = env._local._games[0], torch.zeros(1, 5)
    asked = int(game._cur_button_states[0])
    seen = []
    for state in (1 - asked, asked, 1 - asked, asked):
        game._cur_button_states[0] = state
        seen.append(env.step(TensorDict({"action": still}, [1]))["next", "events"][0].tolist())
    assert seen == [[False, False, counts and step == 1, False, False, False] for step in range(4)]


def test_games_in_other_processes_play_the_same_and_their_death_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three games over two processes, the second with one: the rollout of one process."""
    alone, spread = (OGBenchEnv(CUBE, 3, seed=2, max_steps=8, workers=n) for n in (1, 2))
    assert alone.max_steps == 8
    assert OGBenchEnv(CUBE, 1).max_steps == 200
    assert OGBenchEnv(SCENE.format(1), 1).max_steps == 750

    def play(env: OGBenchEnv) -> TensorDict:
        torch.manual_seed(0)
        return env.rollout(12, break_when_any_done=False)

    assert (play(alone) == play(spread)).all()

    def fail(actions: object) -> None:
        raise KeyboardInterrupt

    for env in (alone, spread):
        state = env.reset()
        with monkeypatch.context() as patched:
            patched.setattr(env._local, "play", fail)
            with pytest.raises(KeyboardInterrupt):
                env.rand_step(state)
    # The other process has answered the step by then; the reset must not take that answer.
    assert torch.equal(spread.reset()["render_state"], alone.reset()["render_state"])

    spread._remote[0]._process.kill()
    with pytest.raises(RuntimeError, match="process of games has died") as refusal:
        spread.reset()
    assert "\n" not in str(refusal.value)
    spread.close()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        spread.reset()


class Echo:
    """Games that answer what they are asked."""

    def play(self, argument: object) -> object:
        return argument


@pytest.mark.slow
def test_process_that_is_left_with_an_answer_unread_ends_silently(
    capfd: pytest.CaptureFixture[str],
) -> None:
    games = ogbench.RemoteGames(Echo)
    games.send("play", "first")
    assert games._connection.poll(60)  # answered, and never read
    games._connection.close()
    games._process.join(60)
    assert games._process.exitcode == 0
    assert capfd.readouterr().err == ""
    games.close()


def test_games_that_cannot_be_built_leave_no_process_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = []

    class Remote:
        def __init__(self, build: object) -> None:
            left.append(self)

        def close(self) -> None:
            left.remove(self)

    def fail(env_id: str, num_games: int) -> None:
        assert len(left) == 2
        raise MemoryError

    monkeypatch.setattr(ogbench, "RemoteGames", Remote)
    monkeypatch.setattr(ogbench.simulator(), "Games", fail)
    with pytest.raises(MemoryError):
        OGBenchEnv(CUBE, 3, workers=3)
    assert not left


def test_simulator_is_imported_without_graphics_and_the_choice_of_a_library_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}
    monkeypatch.setattr(
        ogbench, "import_module", lambda name: seen.setdefault(name, os.environ.get("MUJOCO_GL"))
    )
    for asked in ("egl", None):
        seen.clear()
        monkeypatch.setenv("MUJOCO_GL", "egl")
        if asked is None:
            monkeypatch.delenv("MUJOCO_GL")
        ogbench.simulator()
        assert seen == {"mujoco": asked, "vlmrb_torchrl.envs.ogbench_games": "disabled"}
        assert os.environ.get("MUJOCO_GL") == asked


@pytest.mark.slow
def test_environment_is_built_where_the_graphics_library_that_was_asked_for_is_missing() -> None:
    """Games draw nothing. The choice of a library stays the user's."""
    program = (
        "import os, sys, mujoco; from vlmrb_torchrl.envs import OGBenchEnv\n"
        f"if __name__ == '__main__': OGBenchEnv({CUBE!r}, 2, workers=2).rollout(2)\n"
        "assert os.environ['MUJOCO_GL'] == 'egl' and hasattr(mujoco, 'GLContext')"
    )
    setting = {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | setting)


def test_missing_ogbench_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vlmrb_torchrl.envs.ogbench_games", raising=False)
    for module in [name for name in sys.modules if name.split(".")[0] == "ogbench"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ImportError, match=r"pip install 'vlmrb-torchrl\[ogbench\]'") as refusal:
        OGBenchEnv(CUBE)
    assert "\n" not in str(refusal.value)
