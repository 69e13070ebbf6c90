"""Bad configurations are refused in one line, before anything is built; good ones are parsed."""

import importlib
import inspect
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrl.envs import ExcludeTransform, GymEnv, TransformedEnv

import recipes
from recipes.arguments import PositiveFinite
from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.running.metrics import read_rows
from recipes.sac import SAC
from recipes.tasks import DoorKey, Task
from recipes.td3 import TD3
from tests.recipes.resuming import start
from vlmrb_torchrl.checks import one_line
from vlmrb_torchrl.prompts import OGBENCH
from vlmrb_torchrl.renderers import mujoco as drawing

CONFIGS = Path(cli.__file__).parents[1] / "configs"
RECIPES = {"dqn": DQN, "iqn": IQN}
SHARED = sorted(path for name in RECIPES for path in CONFIGS.glob(f"*/{name}.yaml"))
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser_of():
    """Parsers, each built once."""
    return cache(cli.build_parser)


@pytest.fixture
def settings_of(parser_of):
    """What a command line makes of the settings."""

    def instantiated(algorithm, *arguments):
        parser = parser_of(algorithm)
        return parser.instantiate(parser.parse_args(list(arguments)))

    return instantiated


def test_error_that_is_its_own_context_is_said_in_one_line():
    """As TensorBoard's are, which are raised again at each write."""
    error, other = OSError("no space\nleft"), RuntimeError("while writing")
    error.__context__, other.__context__ = other, error
    assert one_line(error) == "no space left"


class StatelessDoorKey(DoorKey):
    """It has a camera, and nothing to draw from."""

    def make(self, num_envs, seed, *, held_out=False):
        return TransformedEnv(
            super().make(num_envs, seed, held_out=held_out), ExcludeTransform("render_state")
        )


class Alone(Task):
    """Its environments come one by one, not in batches."""

    def make(self, num_envs, seed, *, held_out=False):
        return GymEnv("Pendulum-v1")


def privileged(events):
    judge = {
        "class_path": "PrivilegedScorer",
        "init_args": {"event_names": events, "events": events},
    }
    noisy = {"class_path": "NoisyScorer", "init_args": {"scorer": judge}}
    return [f"--scoring.scorer={json.dumps(each)}" for each in (judge, noisy)]


REFUSED = {
    **dict.fromkeys(privileged(["success", "cube"]), ("PrivilegedScorer's event_names", "DoorKey")),
    # As many as DoorKey's, so that no clip would look wrong.
    **dict.fromkeys(privileged(["key", "door", "goal"]), ("('goal', 'door', 'key')",)),
    "--replay.no_such_key=1": ("no_such_key",),
    "--replay=NoSuchReplay": ("NoSuchReplay",),
    "--scoring.clip_transitions=1000000": ("scoring.clip_transitions", "replay.capacity"),
    "--scoring.stride=33": ("scoring.stride", "33"),
    "--scoring.scorer=NoSuchScorer": ("NoSuchScorer", "--help lists"),
    "--algorithm.no_such_key=1": ("no_such_key",),
    "--training.num_envs=100000": ("training.num_envs x training.steps_per_collection", "200000"),
    "--algorithm.n_steps=9": ("algorithm.n_steps is 9", "steps_per_collection (8)"),
    "--training.warmup_env_steps=240000": ("training.warmup_env_steps", "240000"),
    "--no_such_group.key=1": ("no_such_group",),
    "--config=no_such_file.yaml": ("no_such_file.yaml",),
    "--config={resume: runs/there}": ("resume is runs/there", "in the command itself"),
    "--env=tests.recipes.test_cli.StatelessDoorKey": ("render_state", "StatelessDoorKey"),
    "--env.sprites=other": ("sprites", "misleading"),
    "--env.tile_size=16": ("EmbeddedJudge knows (64, 64) only", "--env.help DoorKey"),
    "--training.eval_every_env_steps=300000": ("training.eval_every_env_steps", "240000"),
    "--scoring.scorer={class_path: HuggingFaceScorer, init_args: {model: ./nope}}": ("./nope",),
    "--scoring.scorer={class_path: EmbeddedJudge, init_args: {device: cudaa}}": ("cudaa",),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_bad_value_is_refused_in_one_line_that_names_it(argument, tmp_path, parser_of, monkeypatch):
    """A number out of its range: `tests/bad_input`."""
    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("something was launched"))
    monkeypatch.setattr(cli, "build_parser", parser_of)
    with pytest.raises(SystemExit) as refusal:
        cli.run(DQN, [argument, f"--training.log_dir={tmp_path}"])
    text = str(refusal.value)
    assert "\n" not in text
    for part in REFUSED[argument]:
        assert part in text
    assert not list(tmp_path.iterdir())


def test_task_without_batches_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("something was launched"))
    with pytest.raises(SystemExit, match=r"Alone\.make\(1\) is \[\]: .*SerialEnv"):
        cli.run(SAC, ["--env=tests.recipes.test_cli.Alone", "--replay=Uniform"])


@pytest.mark.parametrize("path", SHARED + METHODS, ids=lambda path: f"{path.parts[-2]}-{path.stem}")
def test_every_config_is_accepted(path, settings_of):
    cli.check(settings_of(RECIPES.get(path.stem, DQN), f"--config={path}"))


VLM = "--scoring.scorer={class_path: HuggingFaceScorer, init_args: {model: org/name}}"


@pytest.mark.parametrize("missing", ["ogbench", "graphics"])
def test_task_that_cannot_be_built_or_drawn_here_is_refused_in_one_line(missing, monkeypatch):
    def fail():
        raise RuntimeError("MuJoCo cannot draw here: apt-get install libegl1")

    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("something was launched"))
    if missing == "ogbench":
        monkeypatch.delitem(sys.modules, "vlmrb_torchrl.envs.ogbench_games", raising=False)
        for module in [name for name in sys.modules if name.split(".")[0] == "ogbench"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "ogbench", None)
    else:
        monkeypatch.setattr(drawing, "_graphics", fail)
    with pytest.raises(SystemExit, match=r"(pip|apt-get) install") as refusal:
        cli.run(SAC, ["--env=Cube", "--replay=VLMGuided", VLM])
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_graphics_library_that_is_asked_for_and_missing_is_named_in_one_line(monkeypatch):
    def fail(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr("ctypes.CDLL", fail)
    with pytest.raises(SystemExit, match=r"MUJOCO_GL is egl: libEGL.*apt-get install libegl1"):
        importlib.reload(recipes)


def test_judge_of_ogbench_is_asked_the_question_of_ogbench(settings_of):
    settings = settings_of(SAC, "--env=Scene", f"--config={CONFIGS}/ogbench/vlm_rb.yaml")
    assert settings.scoring.scorer.prompts == (OGBENCH["success"],)
    assert settings.replay.signal == "td_error"


@pytest.mark.parametrize("recipe", RECIPES)
def test_default_task_is_the_one_whose_settings_the_defaults_are(recipe, settings_of):
    plain, tuned = (
        settings_of(RECIPES[recipe], *arguments)
        for arguments in ([], [f"--config={CONFIGS}/doorkey_6x6/{recipe}.yaml"])
    )
    assert plain.env.name == tuned.env.name == "doorkey_6x6"
    assert (plain.algorithm, plain.training) == (tuned.algorithm, tuned.training)


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_recipe_without_a_task_is_refused_with_the_settings_to_use(algorithm, monkeypatch):
    """Its defaults suit no task of this project: each wants a length and a pace of its own."""
    monkeypatch.chdir(CONFIGS.parent.parent)
    with pytest.raises(SystemExit) as refusal:
        cli.run(algorithm, [])
    file = f"{algorithm.__name__.lower()}.yaml"
    for task in ("cube_task1", "scene_task1"):
        assert f"recipes/configs/{task}/{file}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "advised"),
    [
        (DQN, ["--env.size=16"], "doorkey_8x8/dqn.yaml"),
        (IQN, ["--config=doorkey_6x6/iqn.yaml", "--env.size=8"], "doorkey_8x8/iqn.yaml"),
        (DQN, ["--config=doorkey_8x8/dqn.yaml", "--env.size=16"], None),
        (DQN, ["--env.size=16", "--config=methods/per.yaml"], "doorkey_8x8/dqn.yaml"),
        (DQN, ["--env.size=16", "--config={training: {total_env_steps: 9000000}}"], None),
        (DQN, ["--env.size=5"], None),
        (SAC, ["--env=Scene", "--replay=Uniform"], "scene_task1/sac.yaml"),
        (TD3, ["--env=Cube", "--replay=Uniform"], "cube_task1/td3.yaml"),
        (SAC, ["--config=scene_task1/sac.yaml", "--env.task=3"], None),
        (SAC, ["--env=tests.recipes.line_task.Line", "--replay=Uniform"], None),
    ],
)
def test_task_that_the_defaults_do_not_suit_is_advised_its_settings(
    algorithm, arguments, advised, settings_of, monkeypatch
):
    monkeypatch.chdir(CONFIGS)
    text = cli.advice(algorithm, settings_of(algorithm, *arguments))
    assert text.endswith(f"use --config {advised}" if advised else "")
    assert bool(text) == bool(advised)


@pytest.mark.parametrize("tasks_per_node", [None, pytest.param("4", marks=pytest.mark.slow)])
def test_in_an_allocation_of_slurm_one_device_trains_and_writes(
    tasks_per_node, tmp_path, monkeypatch
):
    """The last of four tasks; its rank is what Lightning reads when it is imported."""
    set_by_slurm = {"NTASKS": "4", "PROCID": "3", "LOCALID": "3", "NODEID": "0", "JOB_NAME": "x"}
    for name, value in {**set_by_slurm, "NTASKS_PER_NODE": tasks_per_node}.items():
        if value is not None:
            monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    folder = tmp_path / "run"
    length = ["--training.total_env_steps=128", "--training.eval_every_env_steps=0"]
    start(DQN, folder, "--env.size=5", "--replay=Uniform", *length)
    assert torch.load(folder / "policy.ckpt", weights_only=True)["env_steps"] == 128
    assert read_rows(folder)[-1]["env_steps"] == 128
    assert EventAccumulator(str(folder)).Reload().Scalars("train/epsilon")[-1].step == 128


class Capped(DQN):
    """An algorithm of one's own, in one file, with an argument that no other has.

    Args:
        env: Environment whose specs the network is built for.
        gamma: Discount factor.
        ceiling: Largest return.
    """

    def __init__(self, env, *, gamma: float = 0.95, ceiling: PositiveFinite = 1.0) -> None:
        super().__init__(env, gamma=gamma)


def test_algorithm_of_one_s_own_is_one_file_with_arguments_of_its_own(tmp_path):
    with pytest.raises(SystemExit, match=r"algorithm\.ceiling is -1: must be finite float > 0"):
        cli.run(Capped, ["--env=DoorKey", "--algorithm.ceiling=-1"])
    with pytest.raises(SystemExit, match=r"env is not set: name a task"):
        cli.run(Capped, [])
    folder = tmp_path / "run"
    length = ["--training.total_env_steps=32", "--training.warmup_env_steps=0"]
    length += ["--training.eval_every_env_steps=0"]
    start(Capped, folder, "--env=DoorKey", "--replay=Uniform", "--algorithm.ceiling=2", *length)
    written = json.loads((folder / "policy.yaml").read_text())
    assert written["init_args"]["algorithm"] == "tests.recipes.test_cli.Capped"


def test_value_on_the_command_line_overrides_the_file(settings_of):
    path = CONFIGS / "doorkey_6x6" / "dqn.yaml"
    settings = settings_of(DQN, f"--config={path}", "--replay.lmbda=0.25", "--env.max_steps=50")
    assert settings.replay.lmbda == 0.25
    assert (settings.env.size, settings.env.max_steps) == (6, 50)


@pytest.mark.parametrize("recipe", ["dqn", pytest.param("iqn", marks=pytest.mark.slow)])
def test_help_explains_every_setting(recipe, parser_of, capsys):
    algorithm = RECIPES[recipe]
    with pytest.raises(SystemExit) as end:
        parser_of(algorithm).parse_args(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    own = [f"--algorithm.{name}" for name in inspect.signature(algorithm).parameters]
    for setting in ("--training.updates_per_env_step", "--scoring.stride", "--resume FOLDER", *own):
        assert setting in text or setting == "--algorithm.env"
    assert "Gradient steps per environment step" in text
    assert f"python -m recipes.{recipe} --config recipes/configs/TASK/{recipe}.yaml" in text
    assert all(path.parent.name in text for path in SHARED if path.stem == recipe)
    abstract = {"Task", "Replay", "ClipScorer", "PromptedScorer", "SeededScorer", "LocalScorer"}
    choices = re.findall(r"known subclasses: ([^)]*)", text)
    assert len(choices) == 3
    assert not abstract & set(re.findall(r"\w+", " ".join(choices)))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_method_starts_from_its_own_defaults_and_not_from_those_of_the_one_it_replaces(
    path, parser_of
):
    config = parser_of(DQN).parse_args([f"--config={path}"])
    departures = yaml.safe_load(path.read_text())
    for chosen, stated in (
        (config.replay, departures["replay"]),
        (config.scoring.scorer, departures.get("scoring", {}).get("scorer")),
    ):
        if stated is None:
            continue
        module, name = chosen.class_path.rsplit(".", 1)
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        defaults = {
            key: parameter.default
            for key, parameter in signature.parameters.items()
            if key not in stated.get("init_args", {})
        }
        used = {key: chosen.init_args[key] for key in defaults if key in chosen.init_args}
        for key, value in used.items():
            default = defaults[key]
            assert (tuple(value) if isinstance(default, tuple) else value) == default, key
