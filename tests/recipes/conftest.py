import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As in a run: on shared cores, threads that wait for each other slow small tensors tenfold."""
    torch.set_num_threads(1)
