"""Nothing that is loaded runs code; no key is written anywhere."""

from __future__ import annotations

import ast
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import recipes
import vlmrb_torchrl
from recipes.dqn import DQN
from recipes.running import cli
from recipes.running.checkpoint import CHECKPOINTS
from recipes.running.policies import TrainedPolicy
from recipes.sac import SAC
from tests.recipes.resuming import stopped
from vlmrb_torchrl import VLMPrioritizedSampler
from vlmrb_torchrl.checks import ConfigError

PACKAGES = [Path(str(package.__file__)).parent for package in (vlmrb_torchrl, recipes)]
SOURCES = sorted(file for folder in PACKAGES for file in folder.rglob("*.py"))
OWN_PIPE = "scoring_worker.py"
"""Unpickles what its parent sends it through a pipe that no one else has."""
SECRET = "sk-nobody-may-see-this"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call of the packages: its file, the dotted name of what is called, and itself."""
    found = [
        (file.name, node)
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
    ]
    return [(file, ast.unparse(call.func), call) for file, call in found]


def test_every_torch_load_reads_weights_alone() -> None:
    loads = [call for _, name, call in calls() if name == "torch.load"]
    assert len(loads) >= 2
    for call in loads:
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert options.get("weights_only") == "True", ast.unparse(call)


def test_nothing_else_that_could_run_code_is_read() -> None:
    risky = ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "joblib.load", "exec")
    found = {
        (file, name)
        for file, name, call in calls()
        if name in risky or any(option.arg == "allow_pickle" for option in call.keywords)
    }
    assert found == {(OWN_PIPE, "pickle.loads")}


def test_a_sampler_s_checkpoint_that_holds_code_is_refused(tmp_path: Path) -> None:
    sampler, mark = VLMPrioritizedSampler(4), tmp_path / "mark"
    sampler.dumps(tmp_path)
    sampler.loads(tmp_path)
    (file,) = tmp_path.glob("sampler.pt")
    torch.save({**sampler.state_dict(), "_score": Bomb(mark)}, file)
    with pytest.raises(pickle.UnpicklingError):
        sampler.loads(tmp_path)
    assert not mark.exists()


def test_a_run_s_checkpoint_that_holds_code_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    line = ["--env=tests.recipes.line_task.Line", "--algorithm.hidden_features=[8]"]
    stopped(monkeypatch, SAC, folder, *line, "--replay=Uniform", after=10)
    for file in (folder / CHECKPOINTS).rglob("state.pt"):
        torch.save({"algorithm": Bomb(mark)}, file)
    with pytest.raises(SystemExit, match="damaged") as refusal:
        cli.run(SAC, [f"--resume={folder}"])
    assert len(str(refusal.value).splitlines()) == 1
    assert not mark.exists()


def test_a_policy_that_holds_anything_but_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    file, mark = tmp_path / "policy.ckpt", tmp_path / "mark"
    parser = cli.build_parser(DQN)
    parser.save(parser.parse_args(["--env.size=5"]), tmp_path / "config.yaml")
    for algorithm in (Bomb(mark), {}, None):
        torch.save({"algorithm": algorithm}, file)
        if algorithm is None:
            file.write_bytes(b"")
        with pytest.raises(ConfigError, match=r"policy\.ckpt.*name the policy\.ckpt") as refusal:
            TrainedPolicy(str(file))
        assert len(str(refusal.value).splitlines()) == 1
        assert not mark.exists()


def test_the_configuration_that_is_written_names_the_key_s_variable_and_not_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    parser = cli.build_parser(DQN)
    judge = ["base_url=http://localhost/v1", "model=tiny", "api_key_variable=JUDGE_KEY"]
    chosen = [f"--scoring.scorer.{each}" for each in judge]
    config = parser.parse_args(["--scoring.scorer=EndpointScorer", *chosen])
    parser.save(config, tmp_path / "config.yaml")
    written = (tmp_path / "config.yaml").read_text()
    assert SECRET not in written
    arguments = yaml.safe_load(written)["scoring"]["scorer"]["init_args"]
    assert arguments["api_key_variable"] == "JUDGE_KEY"
