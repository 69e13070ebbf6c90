"""Runs of a recipe in processes of their own, quickly started, for tests that end them."""

import multiprocessing
import signal

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.recipes.runs", "recipes.dqn", "recipes.off_policy"])


def run_dqn(arguments, output):
    """What ``python -m recipes.dqn`` does, with what it says in a file."""
    import os

    import torch

    from recipes import cli
    from recipes.dqn import DQN

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
