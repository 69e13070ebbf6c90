"""A run that is killed by SIGKILL, again and again, ends as the one that was never killed."""

import random
import signal

import pytest

from recipes.dqn import DQN
from tests.recipes.resuming import SHORT, assert_same_end, resume, start
from tests.recipes.runs import started
from tests.recipes.test_resume import DOORKEY, PRIVILEGED, SYNC

EVERY = 32  # env steps between two checkpoints
JUDGED = [*DOORKEY, SYNC, PRIVILEGED, f"--training.checkpoint_every_env_steps={EVERY}"]
FARTHEST = 20  # checkpoints until a run is killed
SPREAD_SECONDS = 0.02  # over which the moment lies after the last of them


def newest(folder):
    """Env steps of the last checkpoint."""
    names = [path.name for path in folder.glob("checkpoints/rank0/checkpoint-*")]
    return max((int(name[-12:]) for name in names), default=0)


def killed_and_resumed(folder, arguments, kills, moments):
    """Start, or go on with, the run; kill it at a random moment; say where it was each time.

    Moments are counted in checkpoints, so that a fast machine is not at the end before the last.
    """
    place = [f"--training.log_dir={folder.parent}", f"--training.name={folder.name}"]
    was_at = [0]
    for _ in range(kills):
        asked = [f"--resume={folder}"] if was_at[-1] else [*SHORT, *arguments, *place]
        process = started(asked, folder.with_suffix(".txt"))
        due = was_at[-1] + EVERY * moments.randint(0 if was_at[-1] else 1, FARTHEST)
        while newest(folder) < due and process.is_alive():
            process.join(0.001)
        process.join(moments.uniform(0.0, SPREAD_SECONDS))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, folder.with_suffix(".txt").read_text()
        was_at.append(newest(folder))
    return was_at[1:]


@pytest.mark.parametrize(
    ("kills", "steps"), [(1, 1024), pytest.param(20, 16384, marks=pytest.mark.slow)]
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
