"""A run that was stopped and resumed is, bit for bit, the run that was not."""

import random
from functools import partial

import pytest
import torch

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3
from tests.recipes.resuming import COLLECTIONS, assert_same_end, resume, start, stopped

SYNC = "--scoring.mode=sync"
SMALL = "--algorithm.hidden_features=[16]"
DOORKEY = ["--env.size=5", "--env.max_steps=40", SMALL]
LINE = ["--env=tests.recipes.line_task.Line", SMALL]
PRIVILEGED, NOISY = (
    f"--config={cli.CONFIGS / 'methods' / name}.yaml" for name in ("privileged", "noisy")
)
DEMONSTRATIONS = ["--demonstrations.episodes=4", "--demonstrations.batch_share=0.25"]
RUNS = {
    "dqn, judge that draws, td boost, demonstrations in batches": (
        DQN,
        [*DOORKEY, SYNC, NOISY, "--replay.td_boost=true", *DEMONSTRATIONS],
    ),
    "sac, reducible loss": (SAC, [*LINE, "--replay=ReLo"]),
    "td3, uniform, n steps, compiled": (
        TD3,
        [*LINE, "--replay=Uniform", "--algorithm.n_steps=3", "--training.accelerate=compile"],
    ),
}
SLOW = {
    "dqn, replay policy": (DQN, [*DOORKEY, "--replay=ERO"]),
    "dqn, attentive": (DQN, [*DOORKEY, "--replay=AER"]),
    "dqn, reward bonus": (DQN, [*DOORKEY, SYNC, NOISY, "--replay=RewardBonus"]),
    "dqn, judge": (DQN, [*DOORKEY, SYNC, PRIVILEGED]),
    "dqn, embedded judge": (DQN, [*DOORKEY, SYNC, "--scoring.clip_transitions=32"]),
    "iqn, judge that draws": (IQN, [*DOORKEY, SYNC, NOISY]),
    "sac, prioritized": (SAC, [*LINE, "--replay=Prioritized"]),
    "iqn, prioritized": (IQN, [*DOORKEY, "--replay=Prioritized"]),
}


@pytest.mark.parametrize(
    "name", [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(name, tmp_path, monkeypatch):
    algorithm, arguments = (RUNS | SLOW)[name]
    # Compiled as far as the graph: the C++ of it takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    start(algorithm, tmp_path / "whole", *arguments)
    seed = random.SystemRandom().randrange(2**32)  # a run seeds the common generator
    print(f"seed {seed}")
    first, second = sorted(random.Random(seed).sample(range(1, COLLECTIONS), 2))
    folder = tmp_path / "resumed"
    stopped(monkeypatch, algorithm, folder, *arguments, after=first)
    stopped(monkeypatch, algorithm, folder, after=second - first, by=resume)
    resume(algorithm, folder)
    assert_same_end(tmp_path / "whole", folder)
