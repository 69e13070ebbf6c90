"""Read before torch is imported, by the tests and by the processes that they start."""

import os
from functools import cache
from importlib.util import find_spec

import pytest

# Threads of processes that share two cores wait for each other: twice the CPU time for a model.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@cache  # as it is before a test pretends otherwise
def missing():
    """What some versions of Python and torch cannot have, by words of the errors for want of it."""
    words = {} if find_spec("ogbench") else {"OGBench's tasks need OGBench": "OGBench"}
    try:
        import torchrl._torchrl  # noqa: F401
    except ImportError:
        extension = "TorchRL's extension for this torch"
        words |= {"_torchrl": extension, "SumSegmentTree": extension}
    return words


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test that fails for want of such a thing."""
    absent = missing()
    try:
        return (yield)
    except Exception as error:
        for words, thing in absent.items():
            if words in str(error):
                pytest.skip(f"without {thing}")
        raise
