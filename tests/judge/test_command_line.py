"""The command line refuses in one line what cannot work, before anything is played or written."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from jsonargparse.typing import Path_fr
from tensordict.nn import TensorDictModuleBase

from tests.judge.worlds import Counter
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.judge import __main__ as command_line
from vlmrb_torchrl.judge import collection
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.scorers import ConstantScorer

REFUSED = {
    "--env.size=4": ("size is 4", "5 to 256"),
    "--env.sizes=8": ("sizes",),
    "--env=no_such_module.Env": ("no_such_module", "--env.help"),
    "--env=torchrl.envs.PendulumEnv": ("PendulumEnv", "prompts", "renderer", "JudgedEnv"),
    "--env.num_envs=1": ("mixed", "scripted"),
    "--policy=scriptd": ("scriptd", "scripted", "policy.ckpt"),
    "--policy=no_such_module.Policy": ("no_such_module",),
    "--policy=nowhere/policy.ckpt": ("nowhere/policy.ckpt", "policy.yaml"),
    "--random_share=1.5": ("random_share", "1.5", "v<=1"),
    "--scorers=EmbeddedJudge": ("EmbeddedJudge", "'[EmbeddedJudge]'"),
    "--scorers=[NoSuchJudge]": ("NoSuchJudge",),
    "--scorers=[]": ("scorers", "at least one"),
    "--scorers=[{class_path: EmbeddedJudge, init_args: {questions: [banana]}}]": ("banana", "goal"),
    "--scorers=[{class_path: EmbeddedJudge, init_args: {qestions: [goal]}}]": ("qestions",),
    "--prompts=[gaol]": ("gaol", "goal, door, key"),
    "--prompts=[]": ("prompts", "null"),
    "--event=gaol": ("gaol", "goal, door, key"),
    "--renderer={tile_size: 16}": ("(128, 128)", "EmbeddedJudge knows (64, 64)", "renderer"),
    "--renderer={tile: 16}": ("tile", "tile_size, window"),
    "--clips=0": ("clips: ", "0", "v>0"),
    "--clips=many": ("clips", "many"),
    "--stride=33": ("stride is 33", "clip_transitions (32)"),
    "--gallery=-1": ("gallery", "-1", "v>=0"),
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
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"jsonargparse.*pip install 'vlmrb-torchrl\[judge\]'"):
        importlib.reload(command_line)


def test_without_arguments_the_embedded_judge_is_judged_on_doorkey():
    settings, _ = command_line.parse([])
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
    judge = "{class_path: PrivilegedScorer, init_args: {event_names: [goal, door, key]}}"
    collecting = ["--env.size=5", "--clips=12", "--frames_per_clip=4", f"--save={kept}"]
    rest = ["--gallery=2", "--resamples=20", f"--scorers=[{judge}]"]
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
    settings = Settings(Counter(), [ConstantScorer()], policy="random", load=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        collection.load(settings)


class Still(TensorDictModuleBase):
    """Turns left for ever.

    Args:
        weights: A file that it wants.
    """

    in_keys, out_keys = (), ("action",)

    def __init__(self, weights: Path_fr) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, tensordict):
        return tensordict.set("action", torch.zeros(tensordict.shape, dtype=torch.int64))


@pytest.mark.parametrize("form", ["--policy={}", "--policy {}"])
def test_a_checkpoint_is_played_by_the_class_that_the_file_beside_it_names(form, tmp_path):
    """As recipes write it: a path in ``policy.yaml`` is relative to its folder."""
    checkpoint = tmp_path / "policy.ckpt"
    checkpoint.touch()
    named = {"class_path": f"{__name__}.Still", "init_args": {"weights": "policy.ckpt"}}
    (tmp_path / "policy.yaml").write_text(json.dumps(named))
    settings, _ = command_line.parse(form.format(checkpoint).split())
    assert type(settings.policy).__name__ == "Still"
    assert settings.policy.weights.absolute == str(checkpoint)
