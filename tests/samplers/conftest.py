"""Where the sampler's arrays lie: what a GPU does differently is played on the CPU as well."""

from __future__ import annotations

from typing import Any

import pytest

from vlmrb_torchrl.samplers import VLMPrioritizedSampler, vlm
from vlmrb_torchrl.samplers.trees import RadixSumTree


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers act as they do where reading a value would wait for the device."""
    monkeypatch.setattr(VLMPrioritizedSampler, "_on_cpu", False)
    monkeypatch.setattr(vlm, "make_sum_tree", RadixSumTree)


@pytest.fixture(params=["on the CPU", "as on a GPU"])
def place(request: Any) -> str:
    """Runs a test in both places."""
    if request.param == "as on a GPU":
        request.getfixturevalue("as_on_a_gpu")
    return str(request.param)
