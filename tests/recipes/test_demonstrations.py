"""Demonstrations: the same for every method, whole and successful, at their place in a batch."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from recipes.demonstrations import Batches, Demonstrations
from recipes.dqn import DQN
from recipes.off_policy import store
from recipes.replay import Prioritized, Uniform
from recipes.running import cli
from recipes.running.metrics import read_rows
from recipes.sac import SAC
from recipes.tasks import Cube, DoorKey, Scene
from recipes.transitions import Transitions
from tests.streams import stream
from vlmrb_torchrl import AsyncScorer, VLMPrioritizedSampler, VLMReplayBuffer
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.scorers import PrivilegedScorer

SHORT = [
    "--training.total_env_steps=200",
    "--training.warmup_env_steps=100",
    "--training.eval_every_env_steps=0",
    "--training.log_every_env_steps=100",
    "--training.strip_every_env_steps=0",
    "--training.num_envs=2",
    "--training.progress=false",
    "--replay.batch_size=16",
    "--scoring.mode=sync",
]


def train(tmp_path, name, *arguments, algorithm=DQN):
    folder = [f"--training.log_dir={tmp_path}", f"--training.name={name}"]
    cli.run(algorithm, [*SHORT, *arguments, *folder])
    return read_rows(tmp_path / name)


def test_an_episode_is_judged_as_a_row_of_its_own():
    """No render states, no trajectory ids: nothing else tells that it is one environment's.

    Of transitions 1 to 8 the seventh has the event, so that the second clip of 4 has it.
    """
    sampler = VLMPrioritizedSampler(8)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(8), sampler=sampler, batch_size=4)
    judge = PrivilegedScorer(["fifth", "seventh"], events=("seventh",))
    episode = stream([8], start=1).select(("next", "done"), ("next", "events"))
    with AsyncScorer(buffer, None, judge, clip_transitions=4, mode="sync") as scoring:
        kept = {"transitions": lambda steps: steps.select(("next", "done"))}
        memory = SimpleNamespace(buffer=buffer, scoring=scoring, replay=Uniform(), **kept)
        store(episode, None, memory)
    assert sampler.state_dict()["_score"].tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("task", [DoorKey(5), Cube(max_steps=100)], ids=lambda task: task.name)
def test_every_episode_is_whole_and_succeeds(task):
    played = Demonstrations(3).play(task, seed=1)
    assert len(played) == 3
    for episode in played:
        done = episode["next", "done"].flatten().tolist()
        assert done == [False] * (len(episode) - 1) + [True]
        assert task.success(episode["next"])[-1]


def test_they_follow_from_the_seed_and_leave_other_draws_alone():
    def actions(seed):
        return [episode["action"] for episode in Demonstrations(2).play(DoorKey(6), seed)]

    torch.manual_seed(0)
    first = actions(1)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
    again, other = actions(1), actions(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(a) for a in first] != [len(b) for b in other]


def test_noise_changes_continuous_actions_within_their_bounds():
    quiet, noisy = (Demonstrations(1, action_noise=x).play(Cube(), 0)[0] for x in (0.0, 0.3))
    assert noisy["action"].abs().max() == 1
    # Both start in the same state: the first action differs by a draw of the noise, clamped.
    assert torch.equal(quiet["observation"][0], noisy["observation"][0])
    assert not torch.equal(quiet["action"][0], noisy["action"][0])


def test_failed_episodes_are_left_out():
    """A time limit between the lengths of the same episodes fails the longer ones."""

    def lengths(max_steps):
        played = Demonstrations(8, action_noise=0).play(DoorKey(6, max_steps), seed=0)
        return [len(episode) for episode in played]

    whole = lengths(None)
    limit = sorted(whole)[3]
    assert min(whole) < max(whole)
    assert lengths(limit) == [length for length in whole if length <= limit]


def test_noise_draws_and_the_buffer_s_draws_follow_from_different_numbers(monkeypatch):
    seeds, make = [], torch.Generator

    class Recorded:
        def manual_seed(self, seed):
            seeds.append(seed % 2**32)  # the rest is nothing to torch
            return make().manual_seed(seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    episodes = Demonstrations(2).play(DoorKey(5), seed=7)
    Batches(VLMReplayBuffer(batch_size=4), episodes, 4, Transitions(gamma=0.9), seed=7)
    assert len(seeds) == 2
    assert len({7, *seeds}) == 3  # the buffer's is the seed of the run


def test_demonstrations_are_of_other_episodes_than_any_run_s():
    class Watched(DoorKey):
        def make(self, num_envs, seed, *, held_out=False):
            self.asked = num_envs, seed, held_out
            return super().make(num_envs, seed, held_out=held_out)

    task = Watched(5)
    Demonstrations(2).play(task, seed=7)
    assert task.asked == (2, 2**30 + 7, False)  # a run's own seed is less than 2^30


def test_no_success_at_all_is_refused():
    """Only random actions, in 9 steps: the goal of 5x5 is too far away."""
    with pytest.raises(ConfigError, match=r"demonstrations.episodes is 4: none of them"):
        Demonstrations(4, action_noise=1.0).play(DoorKey(5, max_steps=9), seed=0)


def filled(buffer, slots):
    rows = {"x": torch.arange(slots, dtype=torch.float32), "next": {"y": torch.zeros(slots)}}
    buffer.extend(TensorDict(rows, [slots]))
    return buffer


def episodes():
    def of(first, steps):
        rows = {"x": torch.arange(first, first + steps).float(), "next": {"y": torch.ones(steps)}}
        return TensorDict({**rows, "events": torch.zeros(steps, 3)}, [steps])

    return [of(1000, 3), of(2000, 2)]


def test_share_of_a_batch_and_of_the_loss_is_theirs_and_they_have_no_slot():
    per = {"alpha": 1.0, "beta_start": 1.0, "td_error_offset": 1e-6}
    buffer = filled(Prioritized(capacity=8, batch_size=8, **per).buffer(other_rows=2), 8)
    buffer.update_priority(torch.arange(8), torch.arange(1.0, 9.0))  # unequal weights
    batches = Batches(buffer, episodes(), 2, lambda steps: steps.exclude("events"))
    assert batches.prefill == ()
    seen = set()
    for _ in range(40):
        batch = batches.sample()
        assert batch.shape == (8,)
        assert batch["x"][:6].max() < 8
        assert batch["next", "y"].tolist() == [0.0] * 6 + [1.0] * 2
        weight = batch["priority_weight"]
        assert weight[6:].sum() / weight.sum() == pytest.approx(2 / 8)
        assert batch["index"][6:].tolist() == [-1, -1]
        seen |= set(batch["x"][6:].tolist())
    assert seen == {1000, 1001, 1002, 2000, 2001}
    replayed = batches.replayed(batch)
    assert replayed["x"].tolist() == replayed["index"].float().tolist()
    replayed["td_error"] = torch.full((6,), 3.0)
    buffer.update_tensordict_priority(replayed)
    leaves = buffer.sampler._sum_tree[replayed["index"]]
    assert (leaves - 3.0).abs().max() < 1e-5


def test_without_a_share_they_are_for_the_buffer_and_batches_are_the_buffer_s():
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)
    batches = Batches(filled(buffer, 8), episodes())
    assert [len(episode) for episode in batches.prefill] == [3, 2]
    assert batches.figures["demonstration_transitions"] == 5
    batch = batches.sample()
    assert batches.replayed(batch) is batch
    assert batch["x"].max() < 8


@pytest.mark.parametrize(("method", "share"), [("per", "0.5"), ("privileged", "0")])
def test_every_method_trains_with_the_same_ones_and_logs_them(method, share, tmp_path, monkeypatch):
    used, play = [], Demonstrations.play
    expected = Demonstrations(4).play(DoorKey(5), seed=0)
    monkeypatch.setattr(Demonstrations, "play", lambda *a: used.append(play(*a)) or used[-1])
    rows = train(
        tmp_path,
        "run",
        f"--config={cli.CONFIGS}/methods/{method}.yaml",
        "--env.size=5",
        "--replay.capacity=2000",
        "--demonstrations.episodes=4",
        f"--demonstrations.batch_share={share}",
    )
    assert len(used) == 1
    for episode, same in zip(used[0], expected, strict=True):
        assert all(torch.equal(episode[key], same[key]) for key in ("observation", "action"))
    shown = sum(len(episode) for episode in expected)
    last = rows[-1]
    assert last["train/demonstration_episodes"] == 4
    assert last["train/demonstration_transitions"] == shown
    assert last["train/demonstration_rows"] == float(share) * 16
    in_buffer = shown if share == "0" else 0
    assert last["replay/transitions"] == last["env_steps"] + in_buffer
    if method == "privileged" and share == "0":
        assert last["scoring/clips_positive"] >= 4


@pytest.mark.slow
def test_sac_trains_on_the_cube_with_half_of_each_batch_shown(tmp_path):
    rows = train(
        tmp_path,
        "run",
        "--env=Cube",
        "--env.max_steps=60",
        "--replay=Uniform",
        "--replay.batch_size=16",
        "--demonstrations.episodes=2",
        "--demonstrations.batch_share=0.5",
        "--training.eval_every_env_steps=200",
        "--training.eval_episodes=2",
        algorithm=SAC,
    )
    assert any(0 <= row.get("eval/success", -1) <= 1 for row in rows)
    assert any("loss/critic" in row for row in rows)


def test_scene_is_chosen_on_the_command_line_and_names_its_events():
    parser = cli.build_parser(SAC)
    settings = parser.parse_args(["--env=Scene", "--env.task=4", "--env.max_steps=300"])
    task = parser.instantiate(settings).env
    assert isinstance(task, Scene)
    assert task.name == "scene_task4"
    env = task.make(2, seed=0)
    assert env.event_names == task.event_names
    assert (env.env_id, env.max_steps) == ("scene-singletask-task4-v0", 300)
    renderer = task.renderer()
    assert (renderer.shadows, renderer.samples) == (False, 0)  # slow on software GL
    assert Cube().event_names == ("success", "cube")


def test_share_of_no_episodes_is_refused_in_one_line():
    with pytest.raises(SystemExit, match=r"with a batch_share of 0.5 play at least 1") as refusal:
        cli.run(DQN, ["--demonstrations.batch_share=0.5"])
    assert "\n" not in str(refusal.value)


def test_share_fills_whole_rows_and_leaves_some_for_both():
    assert Demonstrations(1, batch_share=0.25).rows(64) == 16
    assert Demonstrations(1).rows(64) == 0
    for share in (0.01, 0.99):
        with pytest.raises(ConfigError, match="leaves nothing"):
            Demonstrations(1, batch_share=share).rows(4)
