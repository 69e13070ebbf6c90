"""Success is any step's, in training and in evaluation; environments are closed come what may."""

from contextlib import closing

import pytest
import torch
from lightning.fabric import Fabric
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from recipes.demonstrations import Demonstrations
from recipes.evaluation import evaluate
from recipes.replay import Prioritized, Uniform
from recipes.running.metrics import Telemetry, read_rows
from recipes.settings import Training
from recipes.tasks import Cube, DoorKey, Scene, Task
from vlmrb_torchrl import VLMReplayBuffer


class CountingEnv(EnvBase):
    """Game i's episodes last i + 1 steps of reward 1; each succeeds in its first step."""

    def __init__(self, num_envs):
        super().__init__(batch_size=[num_envs])
        N = num_envs
        self.observation_spec = Composite(
            {"observation": Unbounded((N, 1)), "events": Binary(1, (N, 1), dtype=torch.bool)},
            shape=(N,),
        )
        self.action_spec = Bounded(-1, 1, (N, 1), dtype=torch.float32)
        self.reward_spec = Unbounded((N, 1))
        self.done_spec = Composite(
            {"done": Categorical(2, shape=(N, 1), dtype=torch.bool)}, shape=(N,)
        )
        self.steps, self.stepped = torch.zeros(N, 1), torch.zeros(N, 1)

    def _reset(self, tensordict=None, **_):
        asked = None if tensordict is None else tensordict.get("_reset", None)
        self.steps *= 0 if asked is None else ~asked
        return self._seen(torch.zeros_like(self.steps, dtype=torch.bool))

    def _step(self, tensordict):
        asked = tensordict.get("_step", torch.ones(self.batch_size, dtype=torch.bool))
        self.steps += asked.view(-1, 1)
        self.stepped += asked.view(-1, 1)
        last = 1 + torch.arange(self.steps.shape[0]).view(-1, 1)
        seen = self._seen(self.steps == 1, self.steps == last)
        return seen.set("reward", torch.ones_like(self.steps))

    def _seen(self, events, done=None):
        done = torch.zeros_like(events) if done is None else done
        seen = {"observation": self.steps.clone(), "events": events, "done": done}
        return TensorDict(seen, self.batch_size)

    def _set_seed(self, seed):
        return seed


class Counting(Task):
    name, event_names, success_event = "counting", ("first",), "first"

    def __init__(self):
        self.made, self.asked = [], []

    def make(self, num_envs, seed, *, held_out=False):
        self.asked.append((num_envs, seed, held_out))
        self.made.append(CountingEnv(num_envs))
        return self.made[-1]


def policy(act=torch.zeros_like):
    module = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    module.weight = torch.nn.Parameter(torch.zeros(()))
    return module


def test_each_game_plays_one_episode_and_waits_for_the_others():
    task = Counting()
    result = evaluate(policy(), task, Training(eval_episodes=3), number=4)
    assert task.asked == [(3, 4, True)]
    assert result == {"success": 1, "return": 2, "length": 2}  # 1, 2 and 3 steps
    assert task.made[0].stepped.flatten().tolist() == [1, 2, 3]
    assert task.made[0].is_closed


@pytest.mark.parametrize("task", [DoorKey(5), Scene(), Cube()], ids=lambda task: task.name)
def test_evaluation_s_episodes_are_not_training_s(task):
    with closing(task.make(1, 0)) as trained, closing(task.make(1, 0, held_out=True)) as judged:
        assert (trained.held_out, judged.held_out) == (False, True)
        starts = [env.reset()["render_state"] for env in (trained, judged)]
    assert not torch.equal(*starts)


def test_training_counts_the_success_of_any_step_over_the_end_of_collections_and_a_resume(tmp_path):
    """Game 1's success is in the first collection, its end in the second."""

    def telemetry(**resumed):
        training = Training(log_every_env_steps=1, progress=False)
        return Telemetry(Fabric(accelerator="cpu"), Counting(), training, tmp_path / "r", **resumed)

    steps = CountingEnv(2).rollout(4, policy(), break_when_any_done=False)
    with telemetry() as stopped:
        stopped.collected(steps[:, :1])
        state = stopped.state_dict()
    with telemetry(resumed=True) as resumed:
        resumed.load_state_dict(state)
        resumed.collected(steps[:, 1:])
        resumed.log(8, Uniform(), VLMReplayBuffer(), None)
    (row,) = read_rows(tmp_path / "r")
    assert row["train/episodes"] == 6
    assert row["train/success"] == 1


def test_what_is_replayed_is_logged_over_a_resume(tmp_path):
    """A ring of 4 that 6 went into: slots 0 to 3 are 1, 0, 3 and 2 transitions old.

    Priorities 1, 1, 2 and 4 with α 1: (Σ p)² / (N Σ p²) = 64 / 88.
    """
    replay = Prioritized(capacity=4, batch_size=2, alpha=1, td_error_offset=1e-9)
    buffer = replay.buffer()
    for rows in (4, 2):
        buffer.extend(TensorDict({"x": torch.zeros(rows)}, [rows]))
    buffer.sample()
    buffer.update_priority(torch.arange(4), torch.tensor([1.0, 1.0, 2.0, 4.0]))
    replay.anneal(buffer.sampler, 0.5)
    batches = [
        {"index": [1, 0], "priority_weight": [1.0, 0.5]},
        {"index": [0, 0], "priority_weight": [0.25, 1.0]},
    ]
    training = Training(log_every_env_steps=1, progress=False)
    state = None
    for entries in batches:
        batch = TensorDict({name: torch.tensor(each) for name, each in entries.items()}, [2])
        where = Fabric(accelerator="cpu"), Counting(), training, tmp_path / "run"
        with Telemetry(*where, resumed=state is not None) as telemetry:
            if state is not None:
                telemetry.load_state_dict(state)
            figure = torch.tensor(3.0 if state is None else 4.0)
            telemetry.updated({"value/td_error": figure}, batch, buffer)
            state = telemetry.state_dict()
            if entries is batches[-1]:
                telemetry.log(8, replay, buffer, None)
    (row,) = read_rows(tmp_path / "run")
    expected = {
        "value/td_error": 3.5,
        "replay/age_transitions": (0 + 1 + 1 + 1) / 4,
        "replay/least_weight": 0.25,
        "replay/beta": 0.7,
        "replay/effective_sample_size": 64 / 88,
        "replay/transitions": 4,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_environments_are_closed_when_playing_fails():
    def fail(observation):
        raise KeyboardInterrupt

    task = Counting()
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy(fail), task, Training(), number=0)
    with pytest.raises(ValueError, match="no demonstrator"):
        Demonstrations(2).play(task, seed=0)
    assert [env.is_closed for env in task.made] == [True, True]
