"""Where the sampler's arrays lie: what a GPU does differently is played on the CPU as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmrb_torchrl import buffer
from vlmrb_torchrl.samplers import VLMPrioritizedSampler, vlm
from vlmrb_torchrl.samplers.trees import RadixSumTree


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers and buffers act as they do where reading a value would wait for the device."""
    monkeypatch.setattr(VLMPrioritizedSampler, "_on_cpu", False)
    monkeypatch.setattr(vlm, "make_sum_tree", RadixSumTree)
    monkeypatch.setattr(buffer.VLMReplayBuffer, "_cuda", lambda _: torch.device("cuda"))
    monkeypatch.setattr(buffer, "sent", lambda values, _: values)
    monkeypatch.setattr(buffer._StreamLock, "_outer_stream", lambda _: None)


@pytest.fixture(params=["on the CPU", "as on a GPU"])
def place(request: Any) -> str:
    """Runs a test in both places."""
    if request.param == "as on a GPU":
        request.getfixturevalue("as_on_a_gpu")
    return str(request.param)
