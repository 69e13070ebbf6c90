import socket

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As in a run: on shared cores, threads that wait for each other slow small tensors tenfold."""
    torch.set_num_threads(1)


@pytest.fixture
def fabric_port():
    """A port for the ranks of `fabric run`: its own is always the same, and may be taken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
