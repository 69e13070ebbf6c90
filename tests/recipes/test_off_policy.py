"""The loop: every method trains, figures are written, ranks count together, reruns are equal."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from recipes import iqn, off_policy
from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.replay import AER, GuidedPER, Prioritized, Replay, VLMGuided
from recipes.running import cli
from recipes.running.cli import check
from recipes.running.metrics import read_rows
from recipes.running.run_state import Games, build_scoring
from recipes.sac import SAC
from recipes.settings import Scoring, Training
from recipes.tasks import DoorKey, Task
from recipes.td3 import TD3
from recipes.transitions import Transitions
from tests.recipes.chain import batch, learner
from tests.recipes.fabric_run import fabric_run
from vlmrb_torchrl.scorers import RandomScorer

ROOT = Path(cli.__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
FILES = sorted([*CONFIGS.rglob("*.yaml"), *(ROOT / "recipes/benchmarks/replay").glob("*.yaml")])
FILES = [path for path in FILES if "\nmethods:" not in path.read_text()]  # a study's
ALGORITHMS = {recipe.__name__.lower(): recipe for recipe in (DQN, IQN, SAC, TD3)}
TRAINED = (
    "methods/vlm_rb.yaml",
    "methods/privileged.yaml",
    "methods/relo.yaml",
    "methods/bonus.yaml",
    "methods/aer.yaml",
    "methods/ero.yaml",
    "doorkey_8x8/dqn/per.yaml",
    "doorkey_8x8/iqn.yaml",
)
"""One file for each method; the others, and OGBench's, wait for the slow tests."""
SHORT = [
    "--env.size=5",
    "--env.max_steps=40",
    "--replay.capacity=600",
    "--training.total_env_steps=384",
    "--training.warmup_env_steps=96",
    "--training.eval_every_env_steps=192",
    "--training.eval_episodes=2",
    "--training.log_every_env_steps=192",
    "--training.strip_every_env_steps=0",
    "--training.num_envs=4",
    "--training.progress=false",
]


def train(folder, *arguments, algorithm=DQN):
    place = [f"--training.log_dir={folder.parent}", f"--training.name={folder.name}"]
    cli.run(algorithm, [*SHORT, *arguments, *place])
    return read_rows(folder)


def task_of(path):
    """The file of the task that a file of settings is for: itself, or what it is laid over."""
    if path.stem in ALGORITHMS:
        return path
    if path.parent.name == "ogbench":
        return CONFIGS / f"{'cube' if 'cube' in path.stem else 'scene'}_task1" / "sac.yaml"
    beside = path.parent.with_suffix(".yaml"), path.parent / "dqn.yaml"
    default = CONFIGS / "doorkey_6x6" / "dqn.yaml"
    return next((task for task in beside if task.exists()), default)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_file_of_settings_is_accepted(algorithm):
    """Which wants every judge to be asked about what its task reports."""
    parser = cli.build_parser(ALGORITHMS[algorithm])
    files = [*FILES, *sorted((Path(__file__).parent / "configs").glob("*/*.yaml"))]
    files = [path for path in files if task_of(path).stem == algorithm]
    assert files
    for path in files:
        given = [f"--config={file}" for file in dict.fromkeys([task_of(path), path])]
        settings = parser.instantiate(parser.parse_args(given))
        if "Perception-LM" not in path.read_text():  # whose pictures want OpenGL
            check(settings)


def as_test(path):
    marks = () if any(path.match(file) for file in TRAINED) else pytest.mark.slow
    return pytest.param(path, marks=marks, id="-".join(path.parts[-2:]))


@pytest.mark.parametrize("path", map(as_test, FILES))
def test_every_file_of_settings_trains_over_the_end_of_the_ring_and_writes_its_figures(
    path, tmp_path, monkeypatch
):
    """Cut short and made small, but as it is in what makes the method and ends its schedules."""
    task, built = task_of(path), []
    cut = [argument for argument in SHORT if not argument.startswith("--env.")]
    cut += ["--env.max_steps=40", "--replay.capacity=300", "--replay.batch_size=16"]
    cut += ["--training.accelerate=eager", "--training.checkpoint_every_env_steps=0"]
    cut += ["--training.steps_per_collection=8", "--training.updates_per_env_step=0.125"]
    cut += ["--training.strip_every_env_steps=192", "--scoring.mode=sync"]
    if "doorkey" in task.parent.name:
        cut += ["--env.size=5"]
    else:  # 40 steps are too few for a demonstration
        pytest.importorskip("ogbench")
        cut += ["--demonstrations.episodes=0", "--demonstrations.batch_share=0"]
    if "Perception-LM" in path.read_text():  # not at hand; pictures of MuJoCo want OpenGL
        cut += ["--scoring.scorer=ConstantScorer"]
    of_replay = Replay.buffer
    monkeypatch.setattr(
        Replay, "buffer", lambda *a: built.append((a[0], of_replay(*a))) or built[-1][1]
    )
    place = [f"--training.log_dir={tmp_path}", "--training.name=run"]
    cli.run(ALGORITHMS[task.stem], [f"--config={task}", f"--config={path}", *cut, *place])
    rows = read_rows(tmp_path / "run")
    assert [row["env_steps"] for row in rows if "eval/return" in row] == [192, 384]
    assert [row["env_steps"] for row in rows if "speed/updates_per_s" in row] == [192, 384]
    last = [row for row in rows if "speed/updates_per_s" in row][-1]
    ((replay, buffer),) = built
    assert last["replay/transitions"] == 300
    if not isinstance(replay, AER):  # whose draws hang on the state of now
        assert 0 < last["replay/effective_sample_size"] <= 1
    assert 0 <= last["replay/age_transitions"] < 300
    assert {"value/q", "value/target", "value/td_error"} < set(last)
    assert ("value/spread" in last) == (task.stem != "dqn")
    assert any(name.startswith("loss/") for name in last)
    times = {name: share for name, share in last.items() if name.startswith("time/")}
    assert {"time/collect", "time/store", "time/sample", "time/update"} <= set(times)
    assert 0 < sum(times.values()) <= 1
    if task.stem in ("dqn", "iqn"):
        assert last["train/epsilon"] == pytest.approx(0.1)
    if isinstance(replay, Prioritized):
        assert last["replay/beta"] == replay.beta_end == buffer.sampler.beta
        least = last["replay/least_weight"]
        assert 0 < least < 1 if replay.beta_end else least == 1  # (N P)^-β of a likely one
    if isinstance(replay, VLMGuided):
        assert last["replay/lambda"] == replay.lmbda == buffer.sampler.lmbda
    if replay.uses_scores:
        assert last["scoring/clips_failed"] == last["scoring/clips_dropped"] == 0
        assert last["scoring/clips_scored"] > 0
        assert last["replay/share_scored"] > 0.5
    assert (tmp_path / "run" / "policy.ckpt").exists()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_without_torchrl_s_extension_per_trains_and_says_what_stands_in(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrl._torchrl", None)  # its import now fails
    with pytest.warns(RuntimeWarning, match="radix tree") as said:
        rows = train(tmp_path / "run", "--replay=Prioritized", "--replay.capacity=300")
    assert [warning.category for warning in said].count(RuntimeWarning) == 1
    last = [row for row in rows if "replay/beta" in row][-1]
    assert (last["replay/transitions"], last["replay/beta"]) == (300, 1)
    assert 0 < last["replay/effective_sample_size"] < 1


@pytest.mark.parametrize("algorithm", [DQN, IQN])
def test_synchronous_rerun_is_equal_and_another_seed_is_not(algorithm, tmp_path):
    settings = [f"--config={CONFIGS / 'methods' / 'noisy.yaml'}", "--scoring.mode=sync"]
    kept = []
    for i, seed in enumerate((3, 3, 4) if algorithm is DQN else (3, 3)):
        given = *settings, f"--training.seed={seed}"
        rows = train(tmp_path / f"run{i}", *given, algorithm=algorithm)
        kept.append([(row.get("loss/value"), row.get("eval/return")) for row in rows])
    assert kept[0] == kept[1]
    assert algorithm is IQN or kept[0] != kept[2]


def test_nothing_is_learnt_or_evaluated_in_the_warm_up_and_evaluations_keep_their_numbers(
    tmp_path, monkeypatch
):
    """The number chooses the games: the second evaluation plays the same whatever came before.

    The warm-up's 200 steps are rounded up to collections of 32.
    """
    played = []
    monkeypatch.setattr(
        off_policy, "evaluate", lambda *inputs: played.append(inputs[-1]) or {"return": 0.0}
    )
    settings = ["--replay=Uniform", "--training.warmup_env_steps=200"]
    settings += ["--training.eval_every_env_steps=90", "--training.log_every_env_steps=32"]
    rows = train(tmp_path / "run", *settings)
    assert [row["env_steps"] for row in rows if "eval/return" in row] == [288, 384]
    assert played == [2, 3]
    assert [row["env_steps"] for row in rows if "loss/value" in row] == list(range(224, 385, 32))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("warmup", [0, 23, 24, 25])
def test_actions_before_the_first_update_are_random_and_no_policy_is_asked(warmup, ranks):
    """Collections of 6 steps a rank: updates begin once those of all ranks exceed the warm-up."""
    asked = []

    def act(observation):
        asked.append(len(played))
        return torch.zeros(len(observation), dtype=torch.int64)

    training = Training(num_envs=3, steps_per_collection=2, warmup_env_steps=warmup)
    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    where = SimpleNamespace(device=torch.device("cpu"), world_size=ranks)
    played = []
    settings = Namespace(env=DoorKey(5), training=training)
    games = Games(settings, policy, where, seed=0, telemetry=None, memory=None)
    asked.clear()  # once, while it was built
    while len(played) < 8:
        played.append(games.play()["action"])
    games.close()
    random = next(k for k in range(1, 8) if 6 * ranks * k > warmup)
    assert sorted(set(asked)) == list(range(random, 8))
    assert not any(actions.any() for actions in played[random:])
    assert all(actions.any() for actions in played[:random])


@pytest.mark.parametrize(
    ("algorithm", "method", "name", "value"),
    [
        (DQN, "per", "beta", lambda done: 0.4 + 0.6 * done),
        (DQN, "aer", "lmbda", lambda done: 2 - done),
        (IQN, "privileged", "lmbda", lambda done: 0.5 * min(1, 12 * done)),
    ],
)
def test_schedules_follow_the_run_s_progress_and_end_where_they_say(
    algorithm, method, name, value, tmp_path, monkeypatch
):
    """Read in each update: ε where actions are chosen, β or λ where batches are drawn.

    A round of 4 updates follows each collection of 32 steps that ends behind the 96 of the
    warm-up. It sees what was set after the one before, whose share of the run is (s - 96) / 288.
    ε falls from 1 to 0.1 over three quarters of that.
    """
    seen, update = [], off_policy.update

    def watched(learner, memory, telemetry):
        seen.append((learner.module.greedy.eps.item(), getattr(memory.buffer.sampler, name)))
        update(learner, memory, telemetry)
        watched.last = learner.module.greedy, memory.buffer.sampler

    monkeypatch.setattr(off_policy, "update", watched)
    settings = [f"--config={CONFIGS / 'methods' / method}.yaml", "--scoring.mode=sync"]
    train(tmp_path / "run", *settings, algorithm=algorithm)
    done = [max(0, (steps - 96) / 288) for steps in range(96, 384, 32)]
    expected = [
        (max(0.1, 1 - 0.9 * share / 0.75), value(share)) for share in done for _ in range(4)
    ]
    assert len(seen) == len(expected)
    for pair, closed_form in zip(seen, expected, strict=True):
        assert pair == pytest.approx(closed_form, abs=1e-7)
    greedy, sampler = watched.last
    assert greedy.eps.item() == pytest.approx(0.1)
    assert getattr(sampler, name) == value(1)


def opened(tmp_path, replay, seed):
    """Share of five evaluations, one after each 16 updates, in which the greedy policy opens it."""
    judge = "{class_path: PrivilegedScorer, init_args: {event_names: [opened], events: [opened]}}"
    settings = {
        "env": "tests.recipes.lock_task.Lock",
        "replay": replay,
        "replay.capacity": 8000,
        "replay.batch_size": 8,
        "scoring.scorer": judge,
        "scoring.mode": "sync",
        "scoring.clip_transitions": 8,
        "algorithm.hidden_features": "[32]",
        "algorithm.learning_rate": 0.01,
        "algorithm.target_update_rate": 0.1,
        "algorithm.gamma": 0.9,
        "algorithm.n_steps": 8,
        "algorithm.epsilon_final": 1,
        "training.total_env_steps": 3072,
        "training.warmup_env_steps": 2000,
        "training.num_envs": 32,
        "training.updates_per_env_step": 0.0625,
        "training.eval_every_env_steps": 256,
        "training.eval_episodes": 1,
        "training.eval_epsilon": 0,
        "training.checkpoint_every_env_steps": 0,
        "training.progress": "false",
        "training.log_dir": tmp_path,
        "training.name": f"{replay}{seed}",
        "training.seed": seed,
    }
    settings |= {"replay.lmbda_share": 0} if replay == "VLMGuided" else {}
    cli.run(DQN, [f"--{name}={value}" for name, value in settings.items()])
    rows = read_rows(tmp_path / f"{replay}{seed}")
    evaluations = [row["eval/success"] for row in rows if "eval/success" in row]
    assert len(evaluations) == 5
    return sum(evaluations) / 5


@pytest.mark.slow
def test_judged_replay_opens_a_lock_that_uniform_replay_does_not(tmp_path):
    """Seven digits, tried at random all along: both methods hold the same steps.

    Of 256 steps 7 belong to an opening, so that 80 updates of 8 rows meet 17 of them under uniform
    replay, where half of the judged draws are such. Over seeds 0 to 23 the share of evaluations
    that open it was 0.11 (0 to 0.4) under uniform and 0.68 (0.4 to 0.8) under judged replay. Of two
    seeds each, drawn from these, the mean difference is 0.4 or more for two uniform runs in 0.2 %
    of cases, and less than that for judged and uniform in 4 %; here it is 0.7.
    """
    gains = [
        opened(tmp_path, "VLMGuided", seed) - opened(tmp_path, "Uniform", seed) for seed in (0, 1)
    ]
    assert sum(gains) / 2 >= 0.4


def test_iqn_s_settings_reach_its_loss(monkeypatch):
    seen, huber = [], iqn.quantile_huber
    monkeypatch.setattr(
        iqn, "quantile_huber", lambda *given: seen.append((*map(_shape, given),)) or huber(*given)
    )
    learner(IQN, online_quantiles=3, target_quantiles=5, kappa=2.0).update(batch(discrete=True))
    assert seen == [((5, 3), (5, 3), (5, 5), 2.0)]


def _shape(given):
    return tuple(given.shape) if isinstance(given, torch.Tensor) else given


def test_guided_replay_s_settings_reach_its_sampler():
    given = {"alpha": 0.3, "beta": 0.2, "td_boost": True, "threshold": None}
    given |= {"negative_priority": 0.1, "unscored_priority": 0.4}
    sampler = VLMGuided(eps=0.01, **given).sampler()
    assert {name: getattr(sampler, name) for name in given} == given
    assert sampler._eps == 0.01
    sampler = GuidedPER(eps=0.01, rest_alpha=0.7, td_error_offset=0.02, **given).sampler()
    assert {name: getattr(sampler, name) for name in given} == given
    rest = sampler.rest
    assert (sampler._eps, rest.alpha, rest._eps, rest.lmbda) == (0.01, 0.7, 0.02, 1.0)


def test_a_new_transition_has_the_error_that_is_computed_for_it_if_asked():
    for first in ("computed", "greatest"):
        replay = Prioritized(alpha=1.0, td_error_offset=1e-3, first_td_error=first)
        buffer = replay.buffer()
        memory = SimpleNamespace(
            buffer=buffer, replay=replay, scoring=None, transitions=Transitions(0.9)
        )
        learner = SimpleNamespace(td_error=lambda rows: 0.25 * torch.arange(1, len(rows) + 1))
        off_policy.store(DoorKey(6).make(2, seed=0).rollout(3), learner, memory)
        assert buffer.sampler.visited[:6].all() == (first == "computed")
        leaf = buffer.sampler.probabilities(6)
        due = [0.25 * (i + 1) if first == "computed" else 1.0 for i in range(6)]
        due = torch.tensor(due, dtype=torch.float64) + 1e-3
        torch.testing.assert_close(leaf, due / due.sum())


def test_each_run_s_noisy_judge_tosses_other_coins():
    def tosses(seed, run):
        buffer = VLMGuided(capacity=64).buffer(0)
        settings = Scoring(RandomScorer(rate=0.5, seed=seed), mode="sync")
        build_scoring(buffer, DoorKey(5), settings, run)
        return settings.scorer(TensorDict({}, [64]))["score"].tolist()

    assert tosses(0, 3) == tosses(3, 0) == tosses(2**63 - 1, 4)
    assert len({tuple(tosses(0, run)) for run in range(4)}) == 4


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_compiled_run_learns_what_the_uncompiled_one_learns(tmp_path):
    """Greedy values round otherwise when compiled, so that its curves are close, not equal."""
    arguments = ("--replay=Uniform", "--algorithm.hidden_features=[8]")
    plain, compiled = (
        [row for row in train(tmp_path / name, *arguments, *more) if "loss/value" in row]
        for name, more in (("plain", ()), ("compiled", ["--training.accelerate=compile"]))
    )
    assert compiled[0]["loss/value"] == pytest.approx(plain[0]["loss/value"], rel=0.05)
    weights, others = (
        torch.load(tmp_path / name / "policy.ckpt", weights_only=True)["algorithm"]
        for name in ("plain", "compiled")
    )
    assert weights.keys() == others.keys()


@pytest.mark.parametrize("setting", ["training.accelerator", "replay.device"])
def test_a_gpu_that_is_not_here_is_refused_in_one_line(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"{setting} is cuda: no GPU is here: use cpu"):
        train(tmp_path / "run", "--replay=Uniform", f"--{setting}=cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["uer", "per", "vlm_rb"])
@pytest.mark.parametrize("memory", ["cpu", "cuda"])
def test_learner_on_a_gpu_trains_with_either_memory(memory, method, tmp_path):
    where = ["--training.accelerator=cuda", f"--replay.device={memory}"]
    rows = train(tmp_path / "run", f"--config={CONFIGS}/methods/{method}.yaml", *where)
    assert any("loss/value" in row for row in rows)


class Unseen(Task):
    """DoorKey-5x5 without a camera and without a name."""

    event_names, success_event = DoorKey.event_names, DoorKey.success_event

    def make(self, num_envs, seed, *, held_out=False):
        return DoorKey(5, max_steps=40).make(num_envs, seed, held_out=held_out)


def test_task_without_a_camera_is_judged_by_its_events(tmp_path):
    judge = f"--config={CONFIGS / 'methods' / 'privileged.yaml'}"
    where = ["--env=tests.recipes.test_off_policy.Unseen", f"--training.log_dir={tmp_path}"]
    short = [argument for argument in SHORT if not argument.startswith("--env.")]
    cli.run(DQN, [judge, *where, *short, "--scoring.mode=sync"])
    (folder,) = tmp_path.iterdir()
    assert folder.name == "dqn_unseen_vlmguided_s0"
    last = [row for row in read_rows(folder) if "scoring/clips_scored" in row][-1]
    assert last["scoring/clips_scored"] > 0
    assert last["scoring/clips_failed"] == 0


def test_judge_that_does_not_load_stops_the_run_in_one_line(tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"no weights")
    judge = f"{{class_path: HuggingFaceScorer, init_args: {{model: {broken}}}}}"
    with pytest.raises(SystemExit, match="does not load") as refusal:
        train(tmp_path / "run", f"--scoring.scorer={judge}", "--scoring.mode=thread")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("recipe", "devices"),
    [
        ("dqn", 2),
        pytest.param("dqn", 1, marks=pytest.mark.slow),
        pytest.param("iqn", 2, marks=pytest.mark.slow),
    ],
)
def test_fabric_run_trains_on_cpu_ranks(recipe, devices, tmp_path):
    method = CONFIGS / "methods" / "privileged.yaml"
    place = [f"--training.log_dir={tmp_path}", "--training.name=run"]
    length = "--training.total_env_steps=400"
    fabric_run(recipe, tmp_path, f"--config={method}", *SHORT, length, *place, devices=devices)
    rows = read_rows(tmp_path / "run")
    # Steps are counted over all ranks: 4 envs x 8 steps x ranks at a time, up to 400 or more.
    saved = torch.load(tmp_path / "run" / "policy.ckpt", weights_only=True)
    assert saved["env_steps"] == (416 if devices == 1 else 448)
    assert any("loss/value" in row for row in rows)
