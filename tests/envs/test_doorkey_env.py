from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from minigrid.core.constants import DIR_TO_VEC
from minigrid.envs.doorkey import DoorKeyEnv as StockDoorKey
from tensordict import TensorDict
from torchrl.collectors import Collector

from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.renderers import minigrid_render_state

LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(7)


def solve(game: Any) -> int:
    """The next action of a shortest way to the key, then the door, then the goal."""
    cells = {(i % game.width, i // game.width): o for i, o in enumerate(game.grid.grid)}
    door = next(at for at, o in cells.items() if o and o.type == "door")
    key = next((at for at, o in cells.items() if o and o.type == "key"), None)
    goal = (game.width - 2, game.height - 2)
    if cells[door].is_open:
        target, last = goal, FORWARD
    elif cells[door].is_locked and not game.carrying:
        assert key is not None
        target, last = key, PICKUP
    else:
        target, last = door, TOGGLE
    start = (int(game.agent_pos[0]), int(game.agent_pos[1]), int(game.agent_dir))
    queue, seen = deque([(start, -1)]), {start}
    while queue:
        (x, y, d), first = queue.popleft()
        ahead = (x + int(DIR_TO_VEC[d][0]), y + int(DIR_TO_VEC[d][1]))
        if ahead == target:
            return last if first < 0 else first
        options = [(LEFT, (x, y, (d - 1) % 4)), (RIGHT, (x, y, (d + 1) % 4))]
        if cells[ahead] is None or cells[ahead].can_overlap():
            options.append((FORWARD, (*ahead, d)))
        for action, state in options:
            if state not in seen:
                seen.add(state)
                queue.append((state, action if first < 0 else first))
    return TOGGLE  # shut in, for example by a dropped key


def observed(game: Any) -> list[int]:
    """The observation by its definition: look at every cell of the window, one at a time."""

    def code(x: int, y: int) -> int:
        if not (0 <= x < game.width and 0 <= y < game.height):
            return 0
        thing = game.grid.get(x, y)
        if thing is None:
            return 0
        if thing.type == "door":
            return 4 if thing.is_open else 2 if thing.is_locked else 3
        return {"wall": 1, "key": 5, "goal": 6}[thing.type]

    reach = game.width - 3  # 2n - 1 cells, n = size - 2: n - 1 on each side of the agent
    (x, y), (fx, fy) = game.agent_pos, DIR_TO_VEC[game.agent_dir]
    rx, ry = -fy, fx  # to the right of facing (y grows downwards)
    window = [
        code(int(x + ahead * fx + right * rx), int(y + ahead * fy + right * ry))
        for ahead in range(reach, -reach - 1, -1)
        for right in range(-reach, reach + 1)
    ]
    return [*window, int(game.carrying is not None)]


def assert_same_state(td: TensorDict, i: int, game: Any, where: str) -> None:
    assert td["observation"][i].tolist() == observed(game), where
    assert torch.equal(td["render_state"][i], minigrid_render_state(game)), where


@pytest.mark.parametrize(("size", "steps"), [(5, 300), (6, 300), (8, 300), (12, 250)])
def test_every_step_equals_stock_minigrid(size: int, steps: int) -> None:
    """Grid, agent, reward, ends and carrying, over resets, with skilled and random actions.

    Truncation at 60 steps makes episodes end both ways; one of three games acts at random.
    """
    N, limit = 3, 60
    env = DoorKeyEnv(size, N, max_steps=limit, seed=11)
    stock = [StockDoorKey(size=size, max_steps=limit) for _ in range(N)]
    episode, rng, ends = [0] * N, np.random.default_rng(size), {"terminated": 0, "truncated": 0}
    for i, game in enumerate(stock):
        game.reset(seed=env.episode_seed(i, 0))
    td = env.reset()
    for step in range(steps):
        noise = (1.0, 0.3, 0.05)
        actions = [
            int(rng.integers(7)) if rng.random() < noise[i] else solve(game)
            for i, game in enumerate(stock)
        ]
        outcome, td = env.step_and_maybe_reset(td.set("action", torch.tensor(actions)))
        after = outcome["next"]
        for i, game in enumerate(stock):
            where = f"size {size}, step {step}, game {i}"
            _, reward, terminated, truncated, _ = game.step(actions[i])
            assert_same_state(after, i, game, where)
            assert after["reward"][i].item() == pytest.approx(reward, rel=1e-6), where
            assert after["terminated"][i].item() == terminated, where
            assert after["truncated"][i].item() == truncated, where
            assert after["done"][i].item() == (terminated or truncated), where
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            if terminated or truncated:
                episode[i] += 1
                game.reset(seed=env.episode_seed(i, episode[i]))
            assert_same_state(td, i, game, where)
    assert min(ends.values()) > 0


def act(env: DoorKeyEnv, td: TensorDict, *actions: int) -> TensorDict:
    return env.step(td.set("action", torch.tensor(actions)))["next"].clone()


def events(td: TensorDict, i: int = 0) -> set[str]:
    return {n for n, e in zip(DoorKeyEnv.event_names, td["events"][i], strict=True) if e}


def test_events_name_what_happened_in_the_transition() -> None:
    """A solved game, with the door shut and opened again on the way."""
    env = DoorKeyEnv(6, 1, seed=2)
    td = env.reset()
    assert not td["events"].any()
    happened = []
    while not td["done"].all():
        action = solve(env._games[0])
        td = act(env, td, action)
        happened += events(td)
        if events(td) == {"door"} and happened.count("door") == 1:
            td = act(env, td, TOGGLE)  # shuts
            assert events(td) == set()
            td = act(env, td, TOGGLE)
            happened += events(td)
    assert happened == ["key", "door", "door", "goal"]
    assert td["terminated"].all()


def test_dropped_key_is_picked_up_again() -> None:
    env = DoorKeyEnv(8, 1, seed=0)
    td = env.reset()
    while events(td) != {"key"}:
        td = act(env, td, solve(env._games[0]))
    assert td["observation"][0, -1] == 1
    td = act(env, td, DROP)
    assert events(td) == set()
    assert td["observation"][0, -1] == 0
    td = act(env, td, PICKUP)
    assert events(td) == {"key"}


def test_window_is_turned_so_that_the_agent_faces_up() -> None:
    """On the goal of 5x5, (3, 3): walls east, south and west of it, and only the north free."""
    env = DoorKeyEnv(5, 1)
    env.reset()
    game = env._games[0]
    for facing, free in enumerate([(2, 1), (3, 2), (2, 3), (1, 2)]):  # left, behind, right, ahead
        game.agent_pos, game.agent_dir = (3, 3), facing
        env._locate(0)
        window = env._pack(np.zeros((1, 3), bool))["observation"][0, :-1].view(5, 5)
        assert window[2, 2] == 6
        around = {at: int(window[at]) for at in [(2, 1), (3, 2), (2, 3), (1, 2)]}
        assert around == {at: int(at != free) for at in around}, f"facing {facing}"


def test_time_limit_truncates_and_does_not_terminate() -> None:
    env = DoorKeyEnv(5, 2)
    assert env.max_steps == 250
    env = DoorKeyEnv(5, 2, max_steps=3)
    td = env.rollout(10, policy=lambda td: td.set("action", torch.full((2,), DONE)))
    assert td.shape == (2, 3)
    last = td["next"][:, -1]
    assert last["truncated"].all()
    assert last["done"].all()
    assert not last["terminated"].any()
    assert not td["next", "done"][:, :-1].any()


def test_goal_on_the_last_step_terminates_and_truncates() -> None:
    free, tight = DoorKeyEnv(5, 1, seed=4), None
    td, actions = free.reset(), []
    while not td["done"].all():
        actions.append(solve(free._games[0]))
        td = act(free, td, actions[-1])
    tight = DoorKeyEnv(5, 1, seed=4, max_steps=len(actions))
    td = tight.reset()
    for action in actions:
        td = act(tight, td, action)
    assert td["terminated"].all()
    assert td["truncated"].all()
    # MiniGrid's 1 - 0.9 steps / max_steps, at steps = max_steps
    assert td["reward"].item() == pytest.approx(0.1)


def test_partial_reset_leaves_the_other_games_alone() -> None:
    env = DoorKeyEnv(6, 3)
    td = act(env, env.reset(), LEFT, LEFT, LEFT)
    mask = torch.tensor([False, True, False])
    fresh = env.reset(td.clone().set("_reset", mask[:, None]))
    assert torch.equal(fresh["render_state"][~mask], td["render_state"][~mask])
    game = StockDoorKey(size=6)
    game.reset(seed=env.episode_seed(1, 1))
    assert_same_state(fresh, 1, game, "second episode")
    assert [g.step_count for g in env._games] == [1, 0, 1]


def test_partial_step_leaves_the_other_games_alone() -> None:
    """As TorchRL's rollouts do that wait until every game is done."""
    env = DoorKeyEnv(6, 2)
    td = env.reset()
    td.set("_step", torch.tensor([True, False]))
    after = act(env, td, LEFT, LEFT)
    assert [g.step_count for g in env._games] == [1, 0]
    assert torch.equal(after["observation"][1], td["observation"][1])
    assert not torch.equal(after["observation"][0], td["observation"][0])
    env = DoorKeyEnv(5, 4, max_steps=20)
    rollout = env.rollout(100, break_when_any_done=False, break_when_all_done=True)
    assert rollout.shape == (4, 20)


def test_what_was_returned_never_changes_afterwards() -> None:
    env = DoorKeyEnv(6, 2)
    td = env.reset()
    kept = td.clone()
    env.rollout(20)
    assert (td == kept).all()


def starts(env: DoorKeyEnv, episodes: int) -> torch.Tensor:
    return torch.stack([env.reset()["render_state"] for _ in range(episodes)])


def test_same_seed_plays_the_same_episodes_for_any_number_of_games() -> None:
    few, many = starts(DoorKeyEnv(8, 2, seed=5), 3), starts(DoorKeyEnv(8, 4, seed=5), 3)
    assert torch.equal(few, many[:, :2])
    assert not torch.equal(few, starts(DoorKeyEnv(8, 2, seed=6), 3))
    assert not torch.equal(many[:, 0], many[:, 1])
    assert not torch.equal(many[0], many[1])


def test_set_seed_restarts_the_stream() -> None:
    env = DoorKeyEnv(8, 2, seed=5)
    first = starts(env, 2)
    env.set_seed(9)
    other = starts(env, 2)
    env.set_seed(5)
    assert torch.equal(starts(env, 2), first)
    assert not torch.equal(first, other)


def test_held_out_seeds_are_disjoint_from_training_seeds() -> None:
    """Whatever the environments' seeds: the upper bit of 32 tells the two apart."""
    for seed in (0, 1, 2**40):
        training = DoorKeyEnv(5, 1, seed=seed)
        held_out = DoorKeyEnv(5, 1, seed=seed, held_out=True)
        for game in range(4):
            for episode in range(50):
                assert 0 <= training.episode_seed(game, episode) < 2**31
                assert 2**31 <= held_out.episode_seed(game, episode) < 2**32
    assert not torch.equal(starts(training, 2), starts(held_out, 2))


def test_restored_environment_goes_on_with_the_next_episodes() -> None:
    env = DoorKeyEnv(8, 2, seed=3)
    starts(env, 2)
    state = env.state_dict()
    following = starts(env, 2)
    other = DoorKeyEnv(8, 2)
    other.load_state_dict(state)
    assert torch.equal(starts(other, 2), following)


def test_collector_starts_a_new_episode_after_each_end() -> None:
    env = DoorKeyEnv(5, 2, max_steps=5, seed=1)
    collector = Collector(lambda: env, None, frames_per_batch=24, total_frames=48)
    data = torch.cat(list(collector), 1)
    assert data.shape == (2, 24)
    ends = data["next", "done"].squeeze(-1)
    assert ends.any()
    follows = torch.zeros(2, 24, dtype=torch.bool)
    follows[:, 1:] = ends[:, :-1]
    goes_on = ~follows
    goes_on[:, 0] = False
    before, after = data["next", "render_state"][:, :-1], data["render_state"][:, 1:]
    assert (before == after).flatten(2).all(-1)[goes_on[:, 1:]].all()
    assert not data["events"][follows].any()
    for i in range(2):
        for episode, step in enumerate(follows[i].nonzero().flatten().tolist(), start=1):
            game = StockDoorKey(size=5)
            game.reset(seed=env.episode_seed(i, episode))
            assert_same_state(data[:, step], i, game, f"episode {episode}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4}, "size=4"),
        ({"num_envs": 0}, "num_envs=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoorKeyEnv(**arguments)  # type: ignore[arg-type]
