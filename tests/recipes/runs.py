"""Runs of a recipe in processes of their own, quickly started, for tests that end them."""

import multiprocessing
import signal
import subprocess
import sys
from contextlib import contextmanager

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.recipes.runs", "recipes.dqn", "recipes.off_policy"])


def run_dqn(arguments, output):
    """What ``python -m recipes.dqn`` does, with what it says in a file."""
    import os

    import torch

    from recipes.dqn import DQN
    from recipes.running import cli

    multiprocessing.set_start_method("fork", force=True)  # as it is in a process of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    cli.run(DQN, arguments)


def started(arguments, output):
    process = CONTEXT.Process(target=run_dqn, args=(arguments, str(output)))
    process.start()
    return process


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder):
    """Another process has ``folder``, until it is killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()
