"""Runs that cannot go on end in one line, with nothing of theirs left behind or spoilt."""

from __future__ import annotations

import math
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import off_policy
from recipes.dqn import DQN
from recipes.running import cli
from recipes.running.metrics import read_rows
from recipes.sac import SAC
from tests.recipes.chain import Chain, ChainEnv
from tests.test_scoring import PATIENT, vanishes
from vlmrb_torchrl import AsyncScorer
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.scorers.embedded import FOLDER

SHORT = [
    "--training.total_env_steps=600",
    "--training.warmup_env_steps=100",
    "--training.updates_per_env_step=0.125",
    "--training.eval_every_env_steps=0",
    "--training.log_every_env_steps=64",
    "--training.strip_every_env_steps=0",
    "--training.num_envs=4",
    "--training.progress=false",
    "--replay.capacity=1000",
]


def run(folder: Path, algorithm: type, *arguments: str) -> None:
    cli.run(algorithm, [*arguments, *SHORT, f"--training.log_dir={folder}", "--training.name=run"])


def refusal(folder: Path, algorithm: type, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(folder, algorithm, *arguments)
    text = str(ended.value)
    assert len(text.splitlines()) == 1
    return text


def leaves(state: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for each in state.values():
            yield from leaves(each)


class SpoiltEnv(ChainEnv):
    """Pays what is no number from its 40th step on."""

    steps, reward = 0, math.nan

    def _step(self, tensordict):
        stepped = super()._step(tensordict)
        self.steps += 1
        if self.steps >= 40:
            stepped["reward"][1] = self.reward
        return stepped


class Spoilt(Chain):
    """The chain with such an environment."""

    def make(self, num_envs, seed, *, held_out=False):
        return SpoiltEnv(num_envs, self.discrete, self.terminates)


@pytest.mark.parametrize(
    ("algorithm", "discrete", "reward"), [(DQN, True, math.nan), (SAC, False, math.inf)]
)
def test_reward_that_is_no_number_stops_the_run_before_a_weight_is_spoilt(
    algorithm, discrete, reward, tmp_path, monkeypatch
):
    """40 steps of 4 environments: 160 env steps, which no update meets; the reward is blamed."""
    modules, updates, update = [], [], off_policy.update

    def counted(learner, *others):
        modules.append(learner.module)
        update(learner, *others)
        updates.append(None)

    monkeypatch.setattr(SpoiltEnv, "reward", reward)
    monkeypatch.setattr(off_policy, "update", counted)
    text = refusal(
        tmp_path,
        algorithm,
        "--env=tests.recipes.test_run_faults.Spoilt",
        f"--env.discrete={discrete}",
        "--replay=Uniform",
        "--algorithm.hidden_features=[8]",
        "--training.checkpoint_every_env_steps=64",
    )
    assert "('next', 'reward')" in text
    (last,) = re.findall(r"the last good checkpoint is (\S+)", text)
    (file,) = Path(last).rglob("state.pt")
    saved = torch.load(file, weights_only=True)["algorithm"]["weights"]
    weights = list(leaves(saved))
    assert weights
    assert all(bool(each.isfinite().all()) for each in weights)
    assert "nothing was learnt from it" in text
    assert len(modules) == len(updates) == 4, "what the steps before had earned"
    assert all(bool(weights.isfinite().all()) for weights in modules[-1].parameters())
    rows = read_rows(tmp_path / "run")
    losses = [value for row in rows for name, value in row.items() if name.startswith("loss/")]
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("replay", ["Uniform", "Prioritized"])
def test_weights_that_grow_beyond_all_numbers_stop_the_run_before_they_are_played(
    replay, tmp_path, monkeypatch
):
    """The data are sound: the step size is blamed, and nothing is played, shown or saved after."""
    played, updates, update = [], [], off_policy.update

    def counted(*arguments):
        updates.append(len(played))
        update(*arguments)

    store = off_policy.store
    monkeypatch.setattr(off_policy, "store", lambda *a: played.append(None) or store(*a))
    monkeypatch.setattr(off_policy, "update", counted)
    text = refusal(
        tmp_path,
        SAC,
        "--env=tests.recipes.chain.Chain",
        f"--replay={replay}",
        "--algorithm.hidden_features=[8]",
        "--algorithm.learning_rate=1e30",
        "--training.checkpoint_every_env_steps=32",
    )
    assert "lower algorithm.learning_rate" in text
    assert updates[-1] == len(played)
    assert all(row["env_steps"] < 32 * len(played) for row in read_rows(tmp_path / "run"))
    saved = max((tmp_path / "run" / "checkpoints" / "rank0").iterdir())
    assert int(saved.name[-12:]) == 32 * (len(played) - 1)


@pytest.mark.parametrize("mode", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_environment_that_raises_ends_the_run_and_the_judge(mode, tmp_path, monkeypatch):
    """Step 60 of 4 games fails, so 224 env steps are whole; their rows are written."""
    threads = threading.active_count()
    pids, steps, step, extend = [], [], DoorKeyEnv._step, AsyncScorer.extend

    def fail(env, tensordict):
        steps.append(None)
        if len(steps) == 60:
            raise OSError("the simulator is gone")
        return step(env, tensordict)

    def watched(scoring, data, kept):
        pids.append(scoring.worker_pid)
        extend(scoring, data, kept)

    monkeypatch.setattr(DoorKeyEnv, "_step", fail)
    monkeypatch.setattr(AsyncScorer, "extend", watched)
    judge = ["--scoring.scorer=ConstantScorer", f"--scoring.mode={mode}"]
    with pytest.raises(OSError, match="the simulator is gone"):
        run(tmp_path, DQN, "--env.size=5", *judge)
    assert len(pids) == 224 / 32
    assert mode == "thread" or vanishes(pids[-1], PATIENT)
    assert threading.active_count() == threads
    assert [row["env_steps"] for row in read_rows(tmp_path / "run")] == [64, 128, 192]


def test_judge_file_that_cannot_be_read_stops_the_run_before_the_first_step(tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(FOLDER, folder)
    (weights,) = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    judge = f"{{class_path: HuggingFaceScorer, init_args: {{model: {folder}}}}}"
    text = refusal(tmp_path, DQN, f"--scoring.scorer={judge}", "--scoring.mode=thread")
    assert str(folder) in text
    assert not (tmp_path / "run" / "metrics.jsonl").is_file() or not read_rows(tmp_path / "run")
