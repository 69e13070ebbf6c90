"""Processes of short programs that share their imports, which take longer than they do."""

from __future__ import annotations

import os
import runpy
import sys
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

WARM = ("recipes.running.cli", "recipes.networks")
"""What every run imports."""


def started(words: list[str], output: Path) -> BaseProcess:
    """Start ``python -m`` with these words; what it prints is added to ``output``.

    It is forked from a process that imports, once, and does nothing else, so that there are no
    threads that a fork would lose.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    process = context.Process(target=_run, args=(words, output))
    process.start()
    return process


def _run(words: list[str], output: Path) -> None:
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
