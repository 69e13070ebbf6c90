"""VLM-RB over PER: the judge's draws and those by TD error, each in its share."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from tests.samplers.sampler_facts import (
    EVERY,
    SEED,
    SLOTS,
    Slots,
    chi_square,
    facts,
    mixture,
    snapshot,
    told,
)
from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.samplers import GuidedPERSampler, VLMPrioritizedSampler

pytestmark = pytest.mark.usefixtures("place")


def made(slots: int = SLOTS, **arguments: Any) -> GuidedPERSampler:
    given = {"lmbda": 0.3, "eps": 1e-2, "rest_alpha": 0.8, "rest_eps": 0.1, **arguments}
    return GuidedPERSampler(slots, **given)


def rows(length: int) -> TensorDict:
    return TensorDict({"x": torch.zeros(length)}, [length])


def by_td_error(td_error: Any, alpha: float = 0.8, eps: float = 0.1) -> np.ndarray:
    """q^R by its definition; unvisited slots were written first, so their |δ| is 1."""
    mass = (np.where(np.isnan(td_error), 1.0, td_error) + eps) ** alpha
    return mass / mass.sum()


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("td_boost", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_follow_both(lmbda: float, td_boost: bool, dtype: torch.dtype) -> None:
    score, td_error = facts(SEED)
    sampler = told(made(lmbda=lmbda, td_boost=td_boost, dtype=dtype, beta=0.4), score, td_error)
    sampler._rng = torch.Generator().manual_seed(SEED)
    judged = {"threshold": 0.5, "unscored_priority": 0.0, "td_boost": td_boost}
    of_judge = mixture(score, td_error, lmbda=1.0, alpha=0.6, eps=1e-2, **judged)
    q = lmbda * of_judge + (1 - lmbda) * by_td_error(td_error.numpy())
    batches = [sampler.sample(Slots(SLOTS), 4096) for _ in range(32)]
    assert chi_square(torch.cat([index for index, _ in batches]), q) > 1e-3
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for index, info in batches:
        np.testing.assert_allclose(info["sampling_probability"], q[index], rtol=exact)
        weight = (SLOTS * q[index]) ** -0.4
        np.testing.assert_allclose(info["priority_weight"], weight, rtol=1e-5)
    np.testing.assert_allclose(sampler.probabilities(SLOTS), q, rtol=exact)
    sampler.check_valid()


def test_without_a_positive_it_is_prioritized_replay_alone() -> None:
    score, td_error = facts(SEED)
    sampler = told(made(lmbda=1.0), torch.zeros_like(score), td_error)
    expected = by_td_error(td_error.numpy())
    np.testing.assert_allclose(sampler.probabilities(SLOTS), expected, rtol=1e-12)
    index, info = sampler.sample(Slots(SLOTS), 64)
    np.testing.assert_allclose(info["sampling_probability"], expected[index], rtol=1e-12)


def test_with_an_exponent_of_0_the_rest_is_the_papers() -> None:
    sampler = told(made(rest_alpha=0.0), *facts(SEED))
    paper = told(VLMPrioritizedSampler(SLOTS, lmbda=0.3, eps=1e-2), *facts(SEED))
    q, expected = (each.probabilities(SLOTS) for each in (sampler, paper))
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=0)


def test_a_slot_that_is_overwritten_or_emptied_is_new_to_both() -> None:
    sampler = made(4, rest_eps=0.0, rest_alpha=1.0)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=2)
    index = buffer.extend(rows(4))
    sampler.update_priority(index, torch.tensor([0.0, 2.0, 0.0, 3.0]))
    assert sampler.probabilities(4).tolist() == pytest.approx([0.0, 0.4, 0.0, 0.6])
    buffer.extend(rows(2))  # over slots 0 and 1, at the greatest |δ|
    torch.testing.assert_close(
        sampler.probabilities(4), torch.tensor([3, 3, 0, 3], dtype=torch.float64) / 9
    )
    buffer.empty()
    buffer.extend(rows(2))
    assert sampler.probabilities(2).tolist() == [0.5, 0.5]
    sampler.check_valid()


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [float("nan"), 1.0]])
def test_a_bad_td_error_is_written_nowhere(bad: list[float], place: str) -> None:
    sampler = told(made(), *facts(SEED))
    before = snapshot(sampler)
    index = torch.tensor([0, 1])
    if place == "on the CPU":
        with pytest.raises(ValueError, match="priority is "):
            sampler.update_priority(index, torch.tensor(bad))
        assert snapshot(sampler) == before
    else:  # the good one is written
        sampler.update_priority(index, torch.tensor(bad))
        for each in (sampler, sampler.rest):
            with pytest.raises(ValueError, match="left out"):
                each.state_dict()
            assert each._td_error[1] == 1.0


def test_a_restored_sampler_draws_the_same_and_a_bad_state_changes_nothing(tmp_path: Any) -> None:
    source, target = told(made(beta=0.4), *facts(SEED)), made()
    source.dumps(tmp_path)
    target.loads(tmp_path)
    assert snapshot(target) == snapshot(source)
    draws = []
    for sampler in (source, target):
        sampler.check_valid()
        sampler._rng = torch.Generator().manual_seed(SEED)
        draws.append(sampler.sample(Slots(SLOTS), 256)[0])
    assert torch.equal(*draws)
    before = snapshot(target)
    state = source.state_dict()
    for damaged in (
        {name: part for name, part in state.items() if name != "rest"},
        {**state, "rest": {**state["rest"], "unscored_priority": 0.5}},
        {**state, "_score": state["_score"] - 7.0},
    ):
        with pytest.raises(ValueError, match="sampler state"):
            target.load_state_dict(damaged)
        assert snapshot(target) == before


def test_a_copy_is_its_own() -> None:
    sampler = told(made(), *facts(SEED))
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        before = snapshot(sampler)
        twin.update_priority(EVERY, torch.rand(SLOTS))
        assert snapshot(sampler) == before
        twin.check_valid()


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"rest_alpha": 2.0}, "rest_alpha is 2"), ({"rest_eps": -1}, "eps is")],
)
def test_a_rest_that_is_none_is_refused(argument: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**argument)


def test_check_valid_notices_td_errors_that_only_one_of_them_has() -> None:
    sampler = told(made(), *facts(SEED))
    sampler.rest.update_priority(torch.tensor([3]), 0.5)
    with pytest.raises(ValueError, match=r"rest\._td_error"):
        sampler.check_valid()
