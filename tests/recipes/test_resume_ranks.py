"""Two processes that learn together are saved together, and go on together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes import cli
from recipes.dqn import DQN
from recipes.metrics import CHECKPOINTS
from tests.recipes.resuming import SHORT, assert_equal, curves
from tests.recipes.test_resume import DOORKEY, PRIVILEGED, SYNC

ROOT = Path(cli.__file__).parent.parent


def run(folder, *arguments):
    command = [str(Path(sys.executable).parent / "fabric"), "run", "--accelerator=cpu"]
    command += ["--strategy=ddp", "--devices=2", str(ROOT / "recipes" / "dqn.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
def test_ranks_resume_bit_equal_and_another_number_of_them_is_refused(tmp_path):
    arguments = [*SHORT, *DOORKEY, SYNC, PRIVILEGED, f"--training.log_dir={tmp_path}"]
    half = "--training.total_env_steps=512"
    for name, *lengths in (("whole",), ("resumed", half)):
        done = run(tmp_path, *arguments, f"--training.name={name}", *lengths)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "resumed"
    longer = "--training.total_env_steps=1024"
    with pytest.raises(SystemExit, match="it was run by 2 processes, and these are 1"):
        cli.run(DQN, [f"--resume={folder}", longer])
    done = run(tmp_path, f"--resume={folder}", longer)
    assert done.returncode == 0, done.stderr
    rows = [
        [{k: v for k, v in row.items() if k != "total_env_steps"} for row in curves(path)]
        for path in (tmp_path / "whole", folder)
    ]
    assert_equal(*rows, "rows")
    for rank in ("rank0", "rank1"):
        states = []
        for path in (tmp_path / "whole", folder):
            (file,) = (path / CHECKPOINTS / rank / "checkpoint-000000001024").rglob("state.pt")
            states.append(torch.load(file, weights_only=True))
            for timed in ("seconds", "written"):
                del states[-1]["telemetry"][timed]
        assert_equal(*states, rank)
