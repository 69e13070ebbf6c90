"""Two processes that learn together are saved together, and go on together."""

import pytest
import torch

from recipes.dqn import DQN
from recipes.running import cli
from recipes.running.checkpoint import CHECKPOINTS
from tests.recipes.fabric_run import fabric_run
from tests.recipes.resuming import SHORT, assert_equal, curves
from tests.recipes.test_resume import DOORKEY, PRIVILEGED, SYNC


@pytest.mark.slow
def test_ranks_resume_bit_equal_and_another_number_of_them_is_refused(tmp_path):
    # Schedules are shares of the run: at once, so that the half is half of the whole.
    at_once = ["--replay.lmbda_share=0", "--algorithm.epsilon_share=0"]
    arguments = [*SHORT, *DOORKEY, SYNC, PRIVILEGED, *at_once, f"--training.log_dir={tmp_path}"]
    half = "--training.total_env_steps=256"
    for name, *lengths in (("whole",), ("resumed", half)):
        fabric_run("dqn", tmp_path, *arguments, f"--training.name={name}", *lengths)
    folder = tmp_path / "resumed"
    longer = "--training.total_env_steps=512"
    with pytest.raises(SystemExit, match="it was run by 2 processes, and these are 1"):
        cli.run(DQN, [f"--resume={folder}", longer])
    fabric_run("dqn", tmp_path, f"--resume={folder}", longer)
    rows = [
        [{k: v for k, v in row.items() if k != "total_env_steps"} for row in curves(path)]
        for path in (tmp_path / "whole", folder)
    ]
    assert_equal(*rows, "rows")
    for rank in ("rank0", "rank1"):
        states = []
        for path in (tmp_path / "whole", folder):
            (file,) = (path / CHECKPOINTS / rank / "checkpoint-000000000512").rglob("state.pt")
            states.append(torch.load(file, weights_only=True))
            for timed in ("seconds", "written"):
                del states[-1]["telemetry"][timed]
        assert_equal(*states, rank)
