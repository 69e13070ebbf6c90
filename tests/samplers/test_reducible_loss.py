"""ReLo: what is drawn follows the mapped differences of the losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tests.samplers.sampler_facts import EVERY, SEED, SLOTS, Slots, chi_square, snapshot
from vlmrb_torchrl import VLMReplayBuffer
from vlmrb_torchrl.samplers import ReducibleLossSampler

pytestmark = pytest.mark.usefixtures("place")
MAPPINGS = {
    "relu": lambda x: np.maximum(x, 0),
    "exponential": lambda x: np.where(x >= 0, x + 1, np.exp(np.minimum(x, 0))),
}


def differences(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of either sign, some of them 0."""
    drawn = torch.randn(SLOTS, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    drawn[::7] = 0
    return drawn


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_draws_follow_the_mapped_differences_and_weights_undo_it(mapping: Any) -> None:
    sampler = ReducibleLossSampler(SLOTS, mapping=mapping, alpha=0.6, beta=0.4, eps=1e-2)
    sampler._rng = torch.Generator().manual_seed(SEED)
    sampler.extend(EVERY)
    sampler.update_priority(EVERY, differences().unsqueeze(-1))
    mass = (MAPPINGS[mapping](differences().double().numpy()) + 1e-2) ** 0.6
    expected = mass / mass.sum()
    np.testing.assert_allclose(sampler.probabilities(SLOTS), expected, rtol=1e-5)
    index, info = sampler.sample(Slots(SLOTS), 65_536)
    assert chi_square(index, expected) > 1e-3
    weight = (SLOTS * expected[index]) ** -0.4
    np.testing.assert_allclose(info["priority_weight"], weight, rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_right_after_a_hard_sync_draws_are_uniform(eps: float) -> None:
    sampler = ReducibleLossSampler(SLOTS, eps=eps)
    sampler.extend(EVERY)
    sampler.update_priority(EVERY, torch.zeros(SLOTS))
    torch.testing.assert_close(
        sampler.probabilities(SLOTS), torch.full((SLOTS,), 1 / SLOTS, dtype=torch.float64)
    )


def test_a_slot_that_is_overwritten_takes_the_greatest_value_seen_and_at_least_one() -> None:
    sampler = ReducibleLossSampler(4, alpha=1.0, eps=0.0)
    sampler.extend(torch.arange(4))
    sampler.update_priority(torch.arange(4), torch.tensor([0.5, 0.25, -1.0, 0.25]))
    assert sampler.probabilities(4).tolist() == [0.5, 0.25, 0.0, 0.25]
    sampler.extend(torch.tensor([2]))
    assert sampler.probabilities(4).tolist() == [0.25, 0.125, 0.5, 0.125]
    sampler.update_priority(torch.tensor([0]), torch.tensor([2.0]))
    sampler.extend(torch.tensor([1]))
    assert sampler.probabilities(4).mul(5.25).tolist() == [2.0, 2.0, 1.0, 0.25]
    sampler.check_valid()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_is_no_difference_is_refused_and_leaves_no_trace(mapping: Any, bad: float) -> None:
    """On a GPU the bad one is left out, and said when values are read next."""
    sampler = ReducibleLossSampler(4, mapping=mapping)
    sampler.extend(torch.arange(4))
    sampler.update_priority(torch.arange(4), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    before = snapshot(sampler)

    def write() -> None:
        sampler.update_priority(torch.arange(2), torch.tensor([bad, bad]))
        sampler.state_dict()

    with pytest.raises(ValueError, match="nothing was written"):
        write()
    assert snapshot(sampler) == before


def test_a_state_is_restored_bit_equal_and_one_of_another_mapping_is_refused() -> None:
    sampler = ReducibleLossSampler(SLOTS, mapping="exponential")
    sampler.extend(EVERY)
    sampler.update_priority(EVERY[:30], differences()[:30])
    again = ReducibleLossSampler(SLOTS, mapping="exponential")
    again.load_state_dict(sampler.state_dict())
    assert snapshot(again) == snapshot(sampler)
    again.check_valid()
    other = ReducibleLossSampler(SLOTS)
    with pytest.raises(ValueError, match="mapping is exponential: build the sampler so; here relu"):
        other.load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="sampler state is 3: pass what state_dict returned"):
        other.load_state_dict(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [TensorDictReplayBuffer, VLMReplayBuffer])
def test_any_tensordict_buffer_hands_it_what_a_learner_found(kind: Any) -> None:
    """The second of eight slots is learnt away, the third is all there is."""
    sampler = ReducibleLossSampler(8, alpha=1.0, eps=1e-9)
    buffer = kind(
        storage=LazyTensorStorage(8), sampler=sampler, batch_size=64, priority_key="reducible_loss"
    )
    buffer.extend(TensorDict({"x": torch.arange(8)}, [8]))
    batch = buffer.sample()
    buffer.update_tensordict_priority(batch.set("reducible_loss", (batch["x"] == 2).float() - 0.5))
    assert set(batch["x"].tolist()) == set(range(8))
    assert set(buffer.sample()["x"].tolist()) == {2}
