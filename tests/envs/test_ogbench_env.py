"""OGBench's tasks in a batch are OGBench's tasks, step for step."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict
from torchrl.collectors import Collector

from vlmrb_torchrl.envs import DemonstratedEnv, OGBenchEnv
from vlmrb_torchrl.envs.ogbench_simulator import simulator
from vlmrb_torchrl.scorers import PrivilegedScorer

SCENE, CUBE = "scene-singletask-task{}-v0", "cube-single-singletask-task1-v0"
JUDGE = Path(__file__).parents[2] / "recipes/configs/ogbench/scene_privileged.yaml"
SUBTASKS = ("cube", "drawer_lock", "window_lock", "drawer", "window")


def stock(env_id: str, max_steps: int) -> Any:
    import ogbench  # noqa: F401

    return gymnasium.make(env_id, max_episode_steps=max_steps, disable_env_checker=True)


def successes(game: Any) -> list[bool]:
    """OGBench's own verdict on each subtask, in its order."""
    found = game.unwrapped._compute_successes()
    flat = found if isinstance(found, list) else [*found[0], *found[1], *found[2:]]
    return [bool(one) for one in flat]


ASKED = {  # what each of the scene's tasks has to be done, undone things among them
    1: ("drawer", "window"),
    2: ("drawer", "window", "drawer_lock", "window_lock"),
    3: ("cube", "window_lock", "drawer", "window"),
    4: ("cube", "drawer_lock", "drawer"),
    5: ("cube", "window", "drawer", "drawer_lock", "window_lock"),
}


def may_happen(env_id: str, done: np.ndarray) -> np.ndarray:
    """Which subtasks can have an event: those not done yet, and what has to be undone."""
    if env_id == CUBE:
        return ~done
    return ~done | np.isin(SUBTASKS, ASKED[int(env_id[len("scene-singletask-task")])])


@pytest.mark.parametrize(
    ("env_id", "limit"),
    [
        (CUBE, 55),
        *((SCENE.format(1 + i), limit) for i, limit in enumerate((70, 130, 140, 130, 240))),
    ],
)
def test_every_step_equals_stock_ogbench(env_id: str, limit: int) -> None:
    """Observation, reward, ends, success and state, over resets, with skilled and random actions.

    The limit of steps makes episodes end both ways; the first game always acts by the oracles, so
    that locks, of which the games share the joints, are set in one and open in another.
    """
    N, steps = 2, max(150, limit + 20)
    env = OGBenchEnv(env_id, N, max_steps=limit, seed=5)
    act, rng = env.demonstrator(), np.random.default_rng(0)
    games = [stock(env_id, limit) for _ in range(N)]
    episode = [0] * N
    for i, game in enumerate(games):
        game.reset(seed=env.episode_seed(i, 0))
    done = [np.array(successes(game)) for game in games]
    due = [may_happen(env_id, one) for one in done]  # a subtask's event comes once in an episode
    td = env.reset()
    ends = {"terminated": 0, "truncated": 0}
    for step in range(steps):
        td = act(td)
        if step % 3:
            td["action"][1] = torch.from_numpy(rng.uniform(-1, 1, 5))
        outcome, td = env.step_and_maybe_reset(td)
        after = outcome["next"]
        for i, game in enumerate(games):
            where = f"step {step}, game {i}"
            seen, reward, terminated, truncated, info = game.step(outcome["action"][i].numpy())
            data = game.unwrapped.data
            assert np.array_equal(after["observation"][i], seen.astype(np.float32)), where
            assert after["reward"][i].item() == reward, where
            assert after["terminated"][i].item() == terminated, where
            assert after["truncated"][i].item() == truncated, where
            assert after["done"][i].item() == (terminated or truncated), where
            assert after["events"][i, 0].item() == info["success"], where
            now = np.array(successes(game))
            completed = due[i] & now & ~done[i]
            assert after["events"][i, 1:].tolist() == completed.tolist(), where
            due[i], done[i] = due[i] & ~completed, now
            locks = getattr(game.unwrapped, "_cur_button_states", np.zeros(0))
            parts = (data.qpos, data.qvel.astype(np.float32), locks.astype(np.uint8))
            assert after["render_state"][i].numpy().tobytes() == b"".join(
                part.tobytes() for part in parts
            ), where
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            if terminated or truncated:
                episode[i] += 1
                seen, _ = game.reset(seed=env.episode_seed(i, episode[i]))
                assert np.array_equal(td["observation"][i], seen.astype(np.float32)), where
                done[i] = np.array(successes(game))
                due[i] = may_happen(env_id, done[i])
    assert min(ends.values()) > 0


def solve(env: OGBenchEnv, steps: int, noise: float = 0.0) -> TensorDict:
    """Demonstrations ``[N, steps]``: each game goes on until all are done."""
    act = env.demonstrator()

    def policy(td: TensorDict) -> TensorDict:
        action = act(td)["action"]
        return td.set("action", (action + noise * torch.randn_like(action)).clamp(-1, 1))

    torch.manual_seed(0)
    return env.rollout(steps, policy, break_when_any_done=False, break_when_all_done=True)


def happened(td: TensorDict, env: OGBenchEnv, game: int = 0) -> list[str]:
    """Names of the events of a game's first episode, in the order in which they happened."""
    end = td["next", "done"][game].flatten().tolist().index(True)
    columns = td["next", "events"][game, : end + 1].nonzero()[:, 1].tolist()
    return [env.event_names[column] for column in columns]


@pytest.mark.parametrize("task", [1, 2, 3, 4, 5])
def test_demonstrator_solves_every_task(task: int) -> None:
    """Every event that may happen does, by the task's definition; success comes last and ends."""
    env = OGBenchEnv(SCENE.format(task), 2, seed=1)
    assert isinstance(env, DemonstratedEnv)
    td = solve(env, 400)
    for game in range(2):
        events = happened(td, env, game)
        assert events[-1] == "success"
        assert sorted(events) == sorted({"success", *ASKED[task]})
        end = td["next", "done"][game].flatten().tolist().index(True)
        assert td["next", "terminated"][game, end]
        assert td["next", "reward"][game, end] == 0  # every subtask is done


def test_demonstrator_stands_noise_and_lays_the_cube_down() -> None:
    env = OGBenchEnv(CUBE, 4, seed=1)
    td = solve(env, 200, noise=0.3)
    assert td["next", "events"][..., 0].any(1).all()
    assert {"cube", "success"} == set(happened(td, env))


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


@pytest.mark.parametrize("task", [1, 2, 3, 4, 5])
def test_privileged_judge_sees_a_subtask_completed_within_the_clip(task: int) -> None:
    """The judge as it is configured for all five tasks, and clips of a step each."""
    settings = yaml.safe_load(JUDGE.read_text())["scoring"]["scorer"]["init_args"]
    env = OGBenchEnv(SCENE.format(task), 1, seed=3)
    assert settings["event_names"] == list(env.event_names)
    judge = PrivilegedScorer(**settings)
    events = solve(env, 400)["next", "events"][0]
    scores = judge(TensorDict({"events": events}, events.shape[:1]))["score"]
    assert scores.sum() == len(ASKED[task]) + 1  # and success
    assert scores.nonzero().flatten().tolist() == events.any(1).nonzero().flatten().tolist()


def test_time_limit_truncates_and_does_not_terminate() -> None:
    assert OGBenchEnv(SCENE.format(1), 1).max_steps == 750
    assert OGBenchEnv(CUBE, 1).max_steps == 200
    last = OGBenchEnv(CUBE, 2, max_steps=3).rollout(10)["next"][:, -1]
    assert last.shape == (2,)
    assert last["truncated"].all()
    assert last["done"].all()
    assert not last["terminated"].any()


def test_success_on_the_last_step_terminates_and_truncates() -> None:
    steps = solve(OGBenchEnv(CUBE, 1, seed=4), 200).shape[1]
    last = solve(OGBenchEnv(CUBE, 1, seed=4, max_steps=steps), 200)["next"][0, -1]
    assert last["terminated"]
    assert last["truncated"]
    assert last["events"][0]


def starts(env: OGBenchEnv, episodes: int) -> torch.Tensor:
    return torch.stack([env.reset()["render_state"] for _ in range(episodes)])


def test_same_seed_plays_the_same_episodes_for_any_number_of_games() -> None:
    few, many = (starts(OGBenchEnv(CUBE, n, seed=5), 3) for n in (2, 4))
    assert torch.equal(few, many[:, :2])
    assert not torch.equal(few, starts(OGBenchEnv(CUBE, 2, seed=6), 3))
    assert not torch.equal(few, starts(OGBenchEnv(CUBE, 2, seed=5, held_out=True), 3))
    assert not torch.equal(many[:, 0], many[:, 1])
    assert not torch.equal(many[0], many[1])


def test_restored_environment_goes_on_with_the_next_episodes() -> None:
    env = OGBenchEnv(CUBE, 2, seed=3)
    starts(env, 2)
    state = env.state_dict()
    following = starts(env, 2)
    other = OGBenchEnv(CUBE, 2)
    other.load_state_dict(state)
    assert torch.equal(starts(other, 2), following)


def test_partial_reset_and_step_leave_the_other_games_alone() -> None:
    env = OGBenchEnv(CUBE, 2)
    td = env.rand_step(env.reset())["next"].clone()
    fresh = env.reset(td.clone().set("_reset", torch.tensor([[False], [True]])))
    assert torch.equal(fresh["render_state"][0], td["render_state"][0])
    assert not torch.equal(fresh["render_state"][1], td["render_state"][1])
    after = env.rand_step(fresh.set("_step", torch.tensor([True, False])))["next"]
    assert not torch.equal(after["render_state"][0], td["render_state"][0])
    assert torch.equal(after["render_state"][1], fresh["render_state"][1])


def test_what_was_returned_never_changes_afterwards() -> None:
    env = OGBenchEnv(CUBE, 2)
    td = env.rand_step(env.reset())
    kept = td.clone()
    env.rollout(10)
    assert (td == kept).all()


def test_collector_starts_a_new_episode_after_each_end() -> None:
    env = OGBenchEnv(CUBE, 2, max_steps=5, seed=1)
    collector = Collector(lambda: env, None, frames_per_batch=24, total_frames=24)
    data = next(iter(collector))
    follows = torch.zeros(2, 12, dtype=torch.bool)
    follows[:, 1:] = data["next", "done"].squeeze(-1)[:, :-1]
    assert follows.sum() == 4  # 12 steps of each game, an end after every 5th
    goes_on = (data["next", "render_state"][:, :-1] == data["render_state"][:, 1:]).all(-1)
    assert torch.equal(goes_on, ~follows[:, 1:])
    assert not data["events"][follows].any()


def test_games_in_other_processes_play_the_same_and_their_death_is_one_line() -> None:
    """Three games over two processes, the second with one: the rollout of one process."""

    def play(env: OGBenchEnv) -> TensorDict:
        env.action_spec.seed = 0
        torch.manual_seed(0)
        return env.rollout(12, break_when_any_done=False)

    arguments = {"env_id": SCENE.format(4), "num_envs": 3, "seed": 2, "max_steps": 8}
    spread = OGBenchEnv(**arguments, workers=2)
    assert (play(OGBenchEnv(**arguments)) == play(spread)).all()
    spread._remote[0]._process.kill()
    with pytest.raises(RuntimeError, match="process of games has died") as refusal:
        spread.reset()
    assert "\n" not in str(refusal.value)
    spread.close()


def test_call_that_fails_leaves_no_answer_behind_and_a_closed_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other process has answered the step by then; the reset must not take that answer."""

    def fail(actions: object) -> None:
        raise KeyboardInterrupt

    alone, spread = (OGBenchEnv(CUBE, 2, seed=2, workers=workers) for workers in (1, 2))
    for env in (alone, spread):
        state = env.reset()
        with monkeypatch.context() as patched:
            patched.setattr(env._local, "play", fail)
            with pytest.raises(KeyboardInterrupt):
                env.rand_step(state)
    assert torch.equal(spread.reset()["render_state"], alone.reset()["render_state"])
    spread.close()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        spread.reset()


def test_games_that_cannot_be_built_leave_no_process_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(multiprocessing.active_children())

    def fail(env_id: str, num_games: int) -> None:
        raise MemoryError

    monkeypatch.setattr(simulator(), "Games", fail)
    with pytest.raises(MemoryError):
        OGBenchEnv(CUBE, 2, workers=2)
    started = set(multiprocessing.active_children()) - before
    for process in started:
        process.join(60)
    assert not any(process.is_alive() for process in started)


def test_environment_is_built_where_the_graphics_library_that_was_asked_for_is_missing() -> None:
    """Games draw nothing. The choice of a library stays the user's."""
    program = (
        "import os, sys, mujoco; from vlmrb_torchrl.envs import OGBenchEnv\n"
        f"if __name__ == '__main__': OGBenchEnv({CUBE!r}, 2, workers=2).rollout(2)\n"
        "assert os.environ['MUJOCO_GL'] == 'egl' and hasattr(mujoco, 'GLContext')"
    )
    setting = {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | setting)


def test_nothing_of_mujoco_is_imported_unless_it_is_used() -> None:
    """Nothing of ours: torchrl.envs itself imports mujoco where that is installed."""
    program = (
        "import sys; sys.modules['mujoco'] = None; "
        "import vlmrb_torchrl.envs.ogbench, vlmrb_torchrl.renderers.mujoco, recipes.tasks; "
        "assert not {'ogbench', 'dm_control'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_missing_ogbench_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vlmrb_torchrl.envs.ogbench_games", raising=False)
    for module in [name for name in sys.modules if name.split(".")[0] == "ogbench"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ImportError, match=r"pip install 'vlmrb-torchrl\[ogbench\]'") as refusal:
        OGBenchEnv(CUBE)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "puzzle-3x3-singletask-task1-v0"}, "scene-singletask-task1-v0 to task5"),
        ({"env_id": "scene-singletask-task6-v0"}, "scene-singletask-task6-v0"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_envs": 2, "workers": 3}, r"workers=3.*\(2\)"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OGBenchEnv(**arguments)
