"""The judge's score as a reward: what is drawn, what is paid, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import TransformedEnv

from tests.samplers.sampler_facts import SEED, SLOTS, chi_square, facts
from vlmrb_torchrl import ScoreBonus, VLMPrioritizedSampler, VLMReplayBuffer
from vlmrb_torchrl.envs import DoorKeyEnv

KINDS = pytest.mark.parametrize("kind", [VLMReplayBuffer, TensorDictReplayBuffer])


def rows(number: int, start: int = 0) -> TensorDict:
    """Each reward says which row it is."""
    number_of = torch.arange(start, start + number, dtype=torch.float32)
    return TensorDict({"next": {"reward": number_of.unsqueeze(-1)}}, [number])


def paying(kind: Any, bonus: float, batch_size: int = 4096, **arguments: Any) -> Any:
    sampler = VLMPrioritizedSampler(SLOTS, lmbda=0.0)
    return kind(
        storage=LazyTensorStorage(SLOTS),
        sampler=sampler,
        batch_size=batch_size,
        transform=ScoreBonus(sampler, bonus, **arguments),
        generator=torch.Generator().manual_seed(SEED),
    )


@KINDS
@pytest.mark.parametrize("bonus", [0.25, -2.0])
@pytest.mark.parametrize("threshold", [0.5, 0.0, None])
def test_rewards_are_those_stored_and_the_bonus_of_the_slot_and_draws_are_uniform(
    kind: Any, bonus: float, threshold: float | None
) -> None:
    buffer = paying(kind, bonus, threshold=threshold)
    index = buffer.extend(rows(SLOTS))
    score, _ = facts(SEED)
    score[:2] = torch.tensor([0.5, 0.0])
    scored = ~score.isnan()
    buffer.sampler.update_score(index[scored], score[scored])
    known = np.nan_to_num(score.numpy(), nan=-1.0)  # not judged: below any threshold
    p = np.maximum(known, 0) if threshold is None else known >= threshold
    for _ in range(2):  # what is stored is not paid again and again
        batch = buffer.sample()
        slot = batch["index"].numpy()
        paid = batch["next", "reward"].squeeze(-1).numpy()
        np.testing.assert_allclose(paid, slot + bonus * p[slot], rtol=1e-6)
        assert batch["next", "reward"].dtype == torch.float32
    assert chi_square(batch["index"], np.full(SLOTS, 1 / SLOTS)) > 1e-3
    assert torch.equal(buffer.storage[:]["next", "reward"], rows(SLOTS)["next", "reward"])


@KINDS
def test_a_slot_that_is_overwritten_pays_nothing_until_it_is_judged(kind: Any) -> None:
    buffer = paying(kind, 100.0)
    index = buffer.extend(rows(SLOTS))
    buffer.sampler.update_score(index, 1.0)
    buffer.extend(rows(10, start=SLOTS))
    batch = buffer.sample()
    assert set(batch["next", "reward"].flatten().long().tolist()) == {
        *range(SLOTS, SLOTS + 10),
        *range(110, 100 + SLOTS),
    }
    buffer.sampler.update_score(index[:10], 1.0)
    assert buffer.sample()["next", "reward"].min() == 110


def test_a_late_score_pays_the_transition_that_it_was_computed_for() -> None:
    buffer = paying(VLMReplayBuffer, 100.0)
    first = rows(SLOTS)
    buffer.extend(first)
    buffer.extend(rows(10, start=SLOTS))
    buffer.write_scores(first["index"], first["index_generation"], torch.ones(SLOTS))
    paid = buffer.sample()["next", "reward"].flatten().long()
    assert set(paid.tolist()) == {*range(SLOTS, SLOTS + 10), *range(110, 100 + SLOTS)}


@KINDS
def test_trajectories_in_a_slot_are_paid_at_each_step(kind: Any) -> None:
    sampler = VLMPrioritizedSampler(3, lmbda=0.0)
    buffer = kind(
        storage=LazyTensorStorage(3),
        sampler=sampler,
        batch_size=16,
        transform=ScoreBonus(sampler, 1.0, reward_key="reward"),
    )
    buffer.extend(TensorDict({"reward": torch.zeros(3, 5)}, [3, 5]))
    sampler.update_score(torch.tensor([1]), 1.0)
    batch = buffer.sample()
    assert torch.equal(batch["reward"], (batch["index"] == 1).float())


def test_a_restored_buffer_pays_and_draws_the_same() -> None:
    buffer, again = paying(VLMReplayBuffer, 0.5), paying(VLMReplayBuffer, 0.5)
    index = buffer.extend(rows(SLOTS))
    buffer.sampler.update_score(index[::3], 1.0)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.sample()["next", "reward"], buffer.sample()["next", "reward"])


def test_no_environment_can_be_paid() -> None:
    bonus = ScoreBonus(VLMPrioritizedSampler(4), 1.0)
    with pytest.raises(RuntimeError, match="an environment has no slots"):
        TransformedEnv(DoorKeyEnv(5, 2), bonus).rollout(2)
