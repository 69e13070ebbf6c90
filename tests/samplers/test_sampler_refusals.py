"""What a sampler refuses, and that a refusal leaves no trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.samplers.sampler_facts import EVERY, SLOTS, snapshot
from vlmrb_torchrl.samplers import VLMPrioritizedSampler


def test_a_refused_setting_is_not_kept_and_the_refusal_has_torchrls_words() -> None:
    sampler = VLMPrioritizedSampler(8, alpha=0.5)
    with pytest.raises(ValueError, match="alpha is -1: alpha must be greater or equal than 0"):
        sampler.alpha = -1
    assert sampler.alpha == 0.5


def test_indices_of_two_dimensions_without_a_storage_are_refused() -> None:
    sampler = VLMPrioritizedSampler(40)
    with pytest.raises(RuntimeError, match="storage"):
        sampler.update_priority(torch.zeros(3, 2, dtype=torch.long), 1.0)


CALLS = [
    *(
        (method, [0, 1], value)
        for method in ("update_priority", "update_score")
        for value in ([0.5, math.nan], [math.inf, 0.5], [0.5, -0.1], math.nan, -1.0)
    ),
    *(
        (method, index, [0.5, 0.5])
        for method in ("update_priority", "update_score", "mark_update")
        for index in ([0, SLOTS], [0, -2], [SLOTS + 5, 1], [0, 2**40], [0.0, 1.0], [True, False])
    ),
    ("update_score", [0, 1], [0.5, 1.0001]),
    ("update_priority", [0, 1], [0.5, 1e308]),  # sums over a few slots would be infinite
    ("update_priority", [0, 1, 2], [0.5, 0.5]),
    ("update_score", [0, 1], [[0.5, 0.5], [0.5, 0.5]]),
]


@pytest.mark.parametrize("full", [False, True])
def test_a_bad_call_is_refused_in_one_line_and_leaves_no_trace(full: bool) -> None:
    sampler = VLMPrioritizedSampler(SLOTS, lmbda=0.5, td_boost=True, threshold=None)
    sampler.extend(EVERY if full else EVERY[: SLOTS // 2])
    sampler.update_score(EVERY[:9], 0.25)
    sampler.update_priority(EVERY[4:15], 0.75)
    before = snapshot(sampler)
    for method, index, value in CALLS:
        arguments = [torch.tensor(index), torch.tensor(value, dtype=torch.float64)]
        with pytest.raises((ValueError, IndexError, RuntimeError)) as refusal:
            getattr(sampler, method)(*arguments[: 1 if method == "mark_update" else 2])
        assert "\n" not in str(refusal.value)
        assert refusal.type is not IndexError or "slot" in str(refusal.value)  # ours, not torch's
        assert snapshot(sampler) == before, (method, index, value)
    sampler.check_valid()


def test_values_come_as_numbers_columns_and_with_gradients() -> None:
    sampler = VLMPrioritizedSampler(4, td_boost=True, unscored_priority=1.0, alpha=1.0, eps=0.0)
    sampler.extend(range(4))
    sampler.update_priority([0, 1], torch.tensor([[2.0], [3.0]], requires_grad=True))
    sampler.update_priority(2, 4.0)
    sampler.update_priority(torch.tensor(3), torch.tensor([[5.0]], dtype=torch.float16))
    assert sampler._sum_tree.leaves().tolist() == [2.0, 3.0, 4.0, 5.0]
    sampler.update_score(np.array([0, 1]), [0.0, 1.0])
    assert sampler._sum_tree.leaves().tolist() == [0.0, 3.0, 4.0, 5.0]
    empty = torch.zeros(0)
    sampler.update_priority(empty.long(), empty)
    sampler.update_score(empty.long(), empty)
    sampler.extend(empty.long())
    sampler.check_valid()
