"""A run that was stopped and resumed is, bit for bit, the run that was not."""

import random
from pathlib import Path

import pytest

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3
from tests.recipes.resuming import COLLECTIONS, assert_same_end, resume, start, stopped

SYNC = "--scoring.mode=sync"
DOORKEY = ["--env.size=5", "--env.max_steps=40"]
LINE = ["--env=tests.recipes.line_task.Line", "--algorithm.hidden_features=[16]"]
METHODS = Path(cli.__file__).parents[1] / "configs" / "methods"
PRIVILEGED, NOISY = (f"--config={METHODS / name}.yaml" for name in ("privileged", "noisy"))
DEMONSTRATIONS = ["--demonstrations.episodes=4", "--demonstrations.batch_share=0.25"]
RUNS = {
    "dqn, judge": (DQN, [*DOORKEY, SYNC, PRIVILEGED]),
    "dqn, embedded judge": (DQN, [*DOORKEY, SYNC, "--scoring.clip_transitions=32"]),
    "dqn, judge and td boost": (
        DQN,
        [*DOORKEY, SYNC, PRIVILEGED, "--replay.td_boost=true"],
    ),
    "iqn, judge that draws": (IQN, [*DOORKEY, SYNC, NOISY]),
    "iqn, prioritized": (IQN, [*DOORKEY, "--replay=Prioritized"]),
    "sac, prioritized": (SAC, [*LINE, "--replay=Prioritized"]),
    "td3, uniform, n steps": (TD3, [*LINE, "--replay=Uniform", "--algorithm.n_steps=3"]),
    "dqn, demonstrations in batches": (
        DQN,
        [*DOORKEY, *DEMONSTRATIONS, "--replay=Uniform"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(name, tmp_path, monkeypatch):
    algorithm, arguments = RUNS[name]
    start(algorithm, tmp_path / "whole", *arguments)
    seed = random.SystemRandom().randrange(2**32)  # a run seeds the common generator
    print(f"seed {seed}")
    first, second = sorted(random.Random(seed).sample(range(1, COLLECTIONS), 2))
    folder = tmp_path / "resumed"
    stopped(monkeypatch, algorithm, folder, *arguments, after=first)
    stopped(monkeypatch, algorithm, folder, after=second - first, by=resume)
    resume(algorithm, folder)
    assert_same_end(tmp_path / "whole", folder)
