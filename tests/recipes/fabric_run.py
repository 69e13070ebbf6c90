"""`fabric run` of a recipe on CPU ranks, as a user's shell does it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fabric_run(recipe, folder, *arguments, devices=2):
    """Run it in ``folder`` to its end, which is to be a good one.

    The recipes are found because they are installed, and by no PYTHONPATH of the test's own.
    """
    with socket.socket() as free:  # fabric's own port is always the same, and may be taken
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "fabric"), "run", "--accelerator=cpu"]
    command += [f"--devices={devices}", f"--main-port={port}"]
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / f"{recipe}.py"), *arguments],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
