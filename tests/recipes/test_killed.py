"""A run that is killed by SIGKILL, again and again, ends as the one that was never killed."""

import random
import signal

import pytest

from recipes.dqn import DQN
from tests.recipes.resuming import SHORT, assert_same_end, resume, start
from tests.recipes.runs import started
from tests.recipes.test_resume import DOORKEY, PRIVILEGED, SYNC

JUDGED = [*DOORKEY, SYNC, PRIVILEGED, "--training.checkpoint_every_env_steps=32"]
LONGEST_SECONDS = 2.0  # until a run is killed


def killed_and_resumed(folder, arguments, kills, moments):
    """Start, or go on with, the run; kill it at a random moment; say where it was each time."""
    place = [f"--training.log_dir={folder.parent}", f"--training.name={folder.name}"]
    was_at = []
    for _ in range(kills):
        goes_on = any(folder.glob("checkpoints/rank0/checkpoint-*"))
        asked = [f"--resume={folder}"] if goes_on else [*SHORT, *arguments, *place]
        process = started(asked, folder.with_suffix(".txt"))
        process.join(moments.uniform(0.0, LONGEST_SECONDS))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, folder.with_suffix(".txt").read_text()
        names = [path.name for path in folder.glob("checkpoints/rank0/checkpoint-*")]
        was_at.append(max((int(name[-12:]) for name in names), default=0))
    return was_at


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 4096), pytest.param(20, 16384, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_and_resumed_is_bit_equal(kills, steps, tmp_path):
    lengths = [f"--training.total_env_steps={steps}", f"--training.eval_every_env_steps={steps}"]
    start(DQN, tmp_path / "whole", *JUDGED, *lengths)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    was_at = killed_and_resumed(tmp_path / "killed", [*JUDGED, *lengths], kills, moments)
    print(f"killed at {was_at} env steps")
    resume(DQN, tmp_path / "killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
