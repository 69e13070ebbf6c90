"""What a sampler refuses, and that a refusal leaves no trace."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tests.samplers.sampler_facts import EVERY, SLOTS, snapshot
from vlmrb_torchrl.samplers import VLMPrioritizedSampler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lmbda": 1.1}, "lmbda must be in \\[0, 1\\], got lmbda=1.1"),
        ({"lmbda": -0.1}, "lmbda"),
        ({"lmbda": math.nan}, "lmbda"),
        ({"alpha": -1.0}, "alpha must be greater or equal than 0"),
        ({"alpha": math.inf}, "alpha"),
        ({"beta": -1.0}, "beta must be greater or equal to 0"),
        ({"eps": -1e-9}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"threshold": 1.5}, "threshold"),
        ({"unscored_priority": 2.0}, "unscored_priority"),
        ({"reduction": "sum"}, "reduction must be one of max, min, median, mean"),
        ({"dtype": torch.float16}, "float16"),
        ({"max_capacity": 0}, "capacity=0"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        VLMPrioritizedSampler(**{"max_capacity": 8, **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lmbda", 1.5),
        ("alpha", -1),
        ("beta", math.nan),
        ("td_boost", 1),
        ("threshold", 1.5),
        ("unscored_priority", None),
    ],
)
def test_an_impossible_value_set_later_is_refused_and_not_kept(name: str, value: float) -> None:
    sampler = VLMPrioritizedSampler(8, lmbda=0.25, alpha=0.5, beta=0.75)
    before = getattr(sampler, name)
    with pytest.raises(ValueError, match=name):
        setattr(sampler, name, value)
    assert getattr(sampler, name) == before


def test_indices_of_two_dimensions_without_a_storage_are_refused() -> None:
    sampler = VLMPrioritizedSampler(40)
    with pytest.raises(RuntimeError, match="storage"):
        sampler.update_priority(torch.zeros(3, 2, dtype=torch.long), 1.0)


NAN, INF = math.nan, math.inf
BAD_VALUES = [[0.5, NAN], [INF, 0.5], [0.5, -0.1], [-INF, 0.5], NAN, -1.0]
BAD_INDICES = [[0, SLOTS], [0, -2], [SLOTS + 5, 1], [0, 2**40]]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("td_boost", [False, True])
@pytest.mark.parametrize(
    ("method", "index", "value"),
    [
        *product(["update_priority", "update_score"], [[0, 1]], BAD_VALUES),
        *product(["update_priority", "update_score"], BAD_INDICES, [[0.5, 0.5]]),
        ("update_score", [0, 1], [0.5, 1.0001]),
        ("update_priority", [0, 1], [0.5, 1e308]),  # sums over a few slots would be infinite
        ("update_priority", [0.0, 1.0], [0.5, 0.5]),
        ("update_score", [True, False], [0.5, 0.5]),
        ("update_score", [0, 1], 2.0),
        ("update_priority", [0, 1, 2], [0.5, 0.5]),
        ("update_score", [0, 1], [[0.5, 0.5], [0.5, 0.5]]),
        *(("mark_update", index, None) for index in BAD_INDICES),
        *(("extend", index, None) for index in BAD_INDICES),
    ],
)
def test_a_bad_call_is_refused_in_one_line_and_leaves_no_trace(
    full: bool, td_boost: bool, method: str, index: list[int], value: Any
) -> None:
    sampler = VLMPrioritizedSampler(SLOTS, lmbda=0.5, td_boost=td_boost, threshold=None)
    sampler.extend(EVERY if full else EVERY[: SLOTS // 2])
    sampler.update_score(EVERY[:9], 0.25)
    sampler.update_priority(EVERY[4:15], 0.75)
    before = snapshot(sampler)
    arguments = [torch.tensor(index)]
    if value is not None:
        arguments.append(torch.tensor(value, dtype=torch.float64))
    with pytest.raises((ValueError, IndexError, RuntimeError)) as refusal:
        getattr(sampler, method)(*arguments)
    assert "\n" not in str(refusal.value)
    assert refusal.type is not IndexError or "slot" in str(refusal.value)  # ours, not torch's
    assert snapshot(sampler) == before
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
