"""An environment from outside, in one file, trains without an edit to the package."""

import math
from pathlib import Path

import pytest
import torch
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type

from recipes import demonstrations
from recipes.evaluation import evaluate
from recipes.running import cli
from recipes.running.metrics import read_rows
from recipes.running.policies import TrainedPolicy
from recipes.sac import SAC
from recipes.settings import Training
from recipes.td3 import TD3
from tests.recipes.fabric_run import fabric_run
from tests.recipes.gymnasium_task import Gymnasium

ROOT = Path(cli.__file__).parents[2]
CONFIGS = Path(__file__).parent / "configs"
SHORT = [
    "--env=tests.recipes.gymnasium_task.Gymnasium",
    "--replay.batch_size=32",
    "--algorithm.hidden_features=[32]",
    "--training.num_envs=2",
    "--training.warmup_env_steps=80",
    "--training.total_env_steps=200",
    "--training.updates_per_env_step=0.5",
    "--training.eval_every_env_steps=100",
    "--training.eval_episodes=2",
    "--training.log_every_env_steps=100",
    "--training.progress=false",
]
BOTH = pytest.mark.parametrize("algorithm", [SAC, TD3])


def train(algorithm, tmp_path, name, *arguments):
    folder = [f"--training.log_dir={tmp_path}", f"--training.name={name}"]
    cli.run(algorithm, [*SHORT, *arguments, *folder])
    return read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["InvertedPendulum-v5", "HalfCheetah-v5", "Pendulum-v1"])
def test_task_builds_environments_that_keep_torchrl_s_word(name):
    check_env_specs(Gymnasium(name).make(2, seed=0))


def test_episodes_follow_from_the_seed_and_evaluation_has_its_own():
    task = Gymnasium()
    first, again, held_out = (
        task.make(2, seed=0, held_out=held_out).reset()["observation"]
        for held_out in (False, False, True)
    )
    assert torch.equal(first, again)
    shown = task.make(2, seed=demonstrations._SEED_OFFSET).reset()["observation"]
    assert len(torch.stack([first, held_out, shown]).unique(dim=0)) == 3


@BOTH
def test_task_without_judge_or_success_trains_and_reruns_and_its_policy_plays_again(
    algorithm, tmp_path, monkeypatch
):
    built = []
    build = cli.build_algorithm
    monkeypatch.setattr(cli, "build_algorithm", lambda *a: built.append(build(*a)) or built[-1])
    rows = train(algorithm, tmp_path, "run", "--replay=Prioritized")
    evaluations = [row for row in rows if "eval/return" in row]
    figures = [row for row in rows if "loss/critic" in row]
    assert len(evaluations) == 2
    # A step of InvertedPendulum pays 1 but for the last, which ends it.
    assert all(row["eval/return"] == row["eval/length"] - 1 for row in evaluations)
    assert not any("success" in name for row in rows for name in row)
    expected = {"loss/actor", "gradient_norm/critic", "train/return", "speed/updates_per_s"}
    expected |= {"loss/temperature", "train/alpha", "train/entropy"} if algorithm is SAC else set()
    assert all(math.isfinite(figures[-1][name]) for name in expected)
    state = Gymnasium().make(2, seed=0).reset()
    policy = TrainedPolicy(tmp_path / "run" / "policy.ckpt", algorithm)
    with torch.no_grad():
        action = policy(state.clone())["action"]
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            assert torch.equal(action, built[0].policy(state.clone())["action"])
    if algorithm is SAC:
        again = train(algorithm, tmp_path, "again", "--replay=Prioritized")
        for name in ("loss/critic", "loss/actor", "eval/return"):
            assert [row.get(name) for row in rows] == [row.get(name) for row in again]


EVENTS = "{event_names: [success], events: [success]}"
PRIVILEGED = f"--scoring.scorer={{class_path: PrivilegedScorer, init_args: {EVENTS}}}"


def test_mujoco_task_is_judged_by_its_events(tmp_path):
    """A step of InvertedPendulum pays 1 while the pole stands, 0 when it falls."""
    arguments = ["--env.success_reward=1", "--replay=VLMGuided", PRIVILEGED]
    arguments += ["--scoring.mode=sync", "--scoring.clip_transitions=1"]
    rows = train(SAC, tmp_path, "run", *arguments)
    last = [row for row in rows if "scoring/clips_scored" in row][-1]
    assert last["scoring/clips_scored"] == last["env_steps"]
    falls = last["scoring/clips_scored"] - last["scoring/clips_positive"]
    assert falls == last["train/episodes"] > 0
    assert last["train/success"] == 1


def test_mujoco_task_is_drawn_from_its_state():
    task = Gymnasium()
    env = task.make(1, seed=0)
    steps = env.rollout(20, break_when_any_done=False)
    states = steps["render_state"][0]
    assert states.shape == (20, 4)  # two positions, two velocities
    # It observes the same, less exactly.
    assert states.dtype == torch.float64
    assert torch.equal(states.float(), steps["observation"][0])
    assert not steps["next", "events"].any()  # success is not known
    try:
        frames = task.renderer()(states)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert frames.shape == (20, 3, 200, 200)
    assert not torch.equal(frames[0], frames[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env.id=NoSuchEnv-v0"], "env.id is NoSuchEnv-v0: Environment `NoSuchEnv`"),
        (["--env.id=Pendulum-v1", "--replay=VLMGuided"], "Gymnasium: it has no renderer"),
        (["--env.id=Pendulum-v1", "--env.success_reward=0"], "Pendulum-v1 is not MuJoCo's"),
    ],
)
def test_what_the_task_lacks_is_refused_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as refusal:
        cli.run(SAC, ["--env=tests.recipes.gymnasium_task.Gymnasium", *arguments])
    assert "\n" not in str(refusal.value)


class Upright(Gymnasium):
    """Success is what this task says it is: here a pole within 0.2 rad, Gymnasium's own limit."""

    def success(self, outcome):
        return outcome["observation"][..., 1].abs() <= 0.2


def test_task_that_says_what_success_is_has_it_measured():
    """The pole starts within 0.01 rad, so every episode has a step of success."""
    task = Upright()
    result = evaluate(SAC(task.make(1, seed=0)).policy, task, Training(eval_episodes=2), number=0)
    assert result["success"] == 1


@BOTH
def test_continuous_policy_is_evaluated_without_chance_and_torch_keeps_its_threads(algorithm):
    task = Gymnasium()
    module = algorithm(task.make(1, seed=0))
    training = Training(eval_episodes=2, eval_epsilon=1.0)
    torch.set_num_threads(1)
    first, again = (evaluate(module.policy, task, training, number=0) for _ in range(2))
    assert first == again
    assert set(first) == {"return", "length"}
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@BOTH
def test_two_ranks_train_together(algorithm, tmp_path):
    """The task is found in the folder where the command is given, as with `python -m`."""
    place = ["--replay=Uniform", f"--training.log_dir={tmp_path}", "--training.name=run"]
    fabric_run(algorithm.__name__.lower(), ROOT, *SHORT, *place)
    assert any("loss/actor" in row for row in read_rows(tmp_path / "run"))


@pytest.mark.slow
@BOTH
def test_pendulum_is_solved_in_10k_steps(algorithm, tmp_path):
    """Published agents reach about -150; one that acts at random gets about -1200."""
    config = CONFIGS / "pendulum" / f"{algorithm.__name__.lower()}.yaml"
    arguments = [f"--config={config}", "--training.total_env_steps=10000"]
    arguments += [f"--training.log_dir={tmp_path}", "--training.name=run"]
    cli.run(algorithm, [*arguments, "--training.progress=false"])
    last = [row for row in read_rows(tmp_path / "run") if "eval/return" in row][-1]
    assert last["env_steps"] == 10_000
    assert last["eval/return"] > -200
