"""The command line refuses in one line what cannot work, before anything is played or written."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tensordict.nn import TensorDictModuleBase

from recipes.dqn import DQN
from recipes.running import cli
from recipes.running.policies import TrainedPolicy
from vlmrb_torchrl import judge
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.judge import __main__ as command_line
from vlmrb_torchrl.judge import arguments, dataset
from vlmrb_torchrl.judge.settings import Settings

REFUSED = {
    "--env.size=4": ("size=4", "5 or more"),
    "--env.sizes=8": ("sizes",),
    "--env=no_such_module.Env": ("no_such_module", "--env.help"),
    "--env=torchrl.envs.PendulumEnv": ("PendulumEnv", "prompts", "renderer", "JudgedEnv"),
    "--env.num_envs=1": ("mixed", "scripted"),
    "--policy=scriptd": ("scriptd", "scripted", "policy.ckpt"),
    "--policy=no_such_module.Policy": ("no_such_module",),
    "--policy=nowhere/policy.ckpt": ("nowhere/policy.ckpt", "policy.yaml"),
    "--random_share=1.5": ("random_share", "1.5", "0 to 1"),
    "--scorers=EmbeddedJudge": ("EmbeddedJudge", "'[EmbeddedJudge]'"),
    "--scorers=[NoSuchJudge]": ("NoSuchJudge",),
    "--scorers=[]": ("scorers", "at least one"),
    "--scorers=[{class_path: EmbeddedJudge, init_args: {questions: [banana]}}]": ("banana", "goal"),
    "--scorers=[{class_path: EmbeddedJudge, init_args: {qestions: [goal]}}]": ("qestions",),
    "--scorers=[{class_path: HuggingFaceScorer, init_args: {model: ./nope}}]": ("./nope",),
    "--prompts=[gaol]": ("gaol", "goal, door, key"),
    "--prompts=[]": ("prompts", "null"),
    "--event=gaol": ("gaol", "goal, door, key"),
    "--renderer={tile_size: 16}": ("(128, 128)", "EmbeddedJudge knows (64, 64)", "renderer"),
    "--renderer={tile: 16}": ("tile", "tile_size, window"),
    "--renderer=large": ("large",),
    "--clips=0": ("clips is 0", "at least 1"),
    "--clips=many": ("clips", "many"),
    "--clip_transitions=0": ("clip_transitions is 0",),
    "--stride=33": ("stride is 33", "clip_transitions (32)"),
    "--threshold=-1": ("threshold", "0 to 1"),
    "--batch_clips=0": ("batch_clips is 0",),
    "--gallery=-1": ("gallery is -1",),
    "--torch_threads=0": ("torch_threads is 0",),
    "--no_such_argument=1": ("no_such_argument", "--help"),
    "--load=nowhere": ("nowhere", "--save"),
    "--config=nowhere.yaml": ("nowhere.yaml",),
}
NO_GPU = "--scorers=[{class_path: EmbeddedJudge, init_args: {device: cuda}}]"


def refusal(argv, tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(command_line, "run", lambda *_: pytest.fail("something was judged"))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as refused:
        command_line.main([*argv, f"--out={out}"])
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith("judge: ")
    assert not out.exists()
    return text


@pytest.mark.parametrize("argument", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_that_names_it(argument, tmp_path, monkeypatch):
    text = refusal([argument], tmp_path, monkeypatch)
    for part in REFUSED[argument]:
        assert part in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    assert "use cpu" in refusal([NO_GPU], tmp_path, monkeypatch)


def test_a_file_in_the_reports_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "run", lambda *_: pytest.fail("something was judged"))
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(SystemExit, match="it is a file"):
        command_line.main([f"--out={file}"])
    assert file.read_text() == "precious"


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, arguments.__name__)
    monkeypatch.delattr(judge, "arguments")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"jsonargparse.*pip install 'vlmrb-torchrl\[judge\]'"):
        command_line.main([])


def test_without_arguments_the_embedded_judge_is_judged_on_doorkey():
    settings, _ = arguments.parse([])
    assert isinstance(settings.env, DoorKeyEnv)
    assert [type(scorer).__name__ for scorer in settings.scorers] == ["EmbeddedJudge"]
    assert settings.env.size == 8
    assert settings.policy == "mixed"
    assert settings.event == "goal"


def test_help_teaches_and_lists_no_foreign_environment(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in Settings.__dataclass_fields__.keys() - {"draw"}:
        assert f"--{name} " in text
    assert "Is this VLM any good here?" in text
    assert "GymEnv" not in text


def test_help_of_a_class_shows_its_arguments(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--env.help=DoorKeyEnv"])
    assert "--env.size" in capsys.readouterr().out


def test_the_whole_way_from_arguments_to_report_and_back_from_saved_clips(tmp_path, capsys):
    """Clips kept by one call, judged again by the next, which knows what they were made with."""
    kept = tmp_path / "kept"
    collecting = ["--env.size=5", "--clips=12", "--frames_per_clip=4", f"--save={kept}"]
    rest = ["--gallery=2", "--resamples=20", "--prompts=[goal, door]"]
    command_line.main([*collecting, *rest, f"--out={tmp_path / 'first'}"])
    assert f"report: {tmp_path / 'first' / 'report.html'}" in capsys.readouterr().out
    command_line.main([*rest, f"--load={kept}", f"--out={tmp_path / 'again'}"])
    first, again = (
        json.loads((tmp_path / name / "figures.json").read_text()) for name in ("first", "again")
    )
    assert first["verdicts"] == again["verdicts"]
    assert again["arguments"]["env"]["init_args"]["size"] == 5
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert names == {"report.html", "report.md", "report.png", "figures.json"}
    for argument, told in (
        ("--clip_transitions=64", "were made with 32"),
        ("--env=torchrl.envs.PendulumEnv", "--env vlmrb_torchrl.envs.DoorKeyEnv"),
    ):
        with pytest.raises(SystemExit, match=told):
            command_line.main([argument, f"--load={kept}"])


def test_a_folder_of_clips_names_no_class_to_import(tmp_path):
    """The user does: else a folder from elsewhere could have any module run."""
    (tmp_path / "meta.json").write_text('{"arguments": {"env": {"class_path": "evil.Env"}}}')
    (tmp_path / "clips.safetensors").touch()
    with pytest.raises(SystemExit, match=r"of --env evil\.Env"):
        command_line.main([f"--load={tmp_path}"])


def test_pickled_clips_are_refused(tmp_path):
    torch.save({"events": torch.zeros(1)}, tmp_path / "clips.safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        dataset.load(tmp_path)


def test_what_a_run_learned_plays_by_its_checkpoints_path(tmp_path, capsys):
    """The policy read back acts as the one that was trained, judged or refused by its env."""
    short = {"total_env_steps": 400, "warmup_env_steps": 200, "eval_every_env_steps": 0}
    training = [f"--training.{name}={value}" for name, value in short.items()]
    run = ["--env.size=5", "--replay=Uniform", "--training.progress=false", "--training.name=run"]
    cli.run(DQN, [*run, *training, f"--training.log_dir={tmp_path}"])
    checkpoint = tmp_path / "run" / "policy.ckpt"
    settings, _ = arguments.parse(["--env.size=5", f"--policy={checkpoint}"])
    assert isinstance(settings.policy, TensorDictModuleBase)
    saved = torch.load(checkpoint, weights_only=True)["algorithm"]
    state = settings.env.reset()
    played = settings.policy(state.clone())
    module = TrainedPolicy(str(checkpoint)).policy
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, saved[f"actor.{name}"])
    assert torch.equal(played["action"], played["action_value"].argmax(-1))
    with pytest.raises(SystemExit, match="cannot act in DoorKeyEnv"):
        command_line.main(["--env.size=8", f"--policy={checkpoint}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
