"""What a slot keeps of scores, TD errors and being overwritten."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictMaxValueWriter

from tests.samplers.sampler_facts import EVERY, SEED, SLOTS, Slots, facts, told, written
from vlmrb_torchrl.samplers import VLMPrioritizedSampler

pytestmark = pytest.mark.usefixtures("place")


def test_a_slot_scored_twice_keeps_the_greater() -> None:
    sampler = VLMPrioritizedSampler(4, lmbda=1.0, threshold=None, alpha=1.0, eps=0.0)
    sampler.extend(torch.arange(4))
    sampler.update_score(torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.25, 0.375]))
    sampler.update_score(torch.tensor([0, 1]), torch.tensor([0.125, 0.75]))
    assert sampler._sum_tree.leaves().tolist() == [0.5, 0.75, 0.0, 0.0]
    sampler.check_valid()


def test_an_overwritten_slot_is_unscored_and_unvisited() -> None:
    sampler = VLMPrioritizedSampler(4, td_boost=True, unscored_priority=0.25, alpha=1.0, eps=0.0)
    sampler.extend(torch.arange(4))
    sampler.update_score(torch.arange(4), 1.0)
    sampler.update_priority(torch.arange(4), torch.tensor([2.0, 3.0, 1.0, 4.0]))
    for overwrite, slot in ((sampler.add, 0), (sampler.extend, [1]), (sampler.mark_update, 2)):
        overwrite(torch.tensor(slot))
    assert sampler.scored.tolist() == sampler.visited.tolist() == [False, False, False, True]
    # p̄ times the running maximum of |δ|, 4
    assert sampler._sum_tree.leaves().tolist() == [1.0, 1.0, 1.0, 4.0]
    sampler.check_valid()


def test_the_stand_in_of_an_unvisited_slot_is_at_least_one() -> None:
    sampler = VLMPrioritizedSampler(3, td_boost=True, unscored_priority=1.0, alpha=1.0, eps=0.0)
    for slot, td_error in enumerate((0.25, 4.0)):
        sampler.extend(torch.tensor([slot]))
        assert sampler._sum_tree[slot] == 1.0
        sampler.update_priority(torch.tensor([slot]), td_error)
    sampler.extend(torch.tensor([2]))
    assert sampler._sum_tree.leaves().tolist() == [0.25, 4.0, 4.0]
    assert sampler.visited.tolist() == [True, True, False]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_td_error_of_zero_is_a_visit(zero: float) -> None:
    sampler = VLMPrioritizedSampler(2, td_boost=True, max_priority_within_buffer=True)
    sampler.extend(torch.arange(2))
    sampler.update_priority(torch.arange(2), torch.tensor([zero, zero]))
    assert sampler.visited.tolist() == [True, True]
    sampler.extend(torch.arange(1))  # its stand-in is that maximum, 0: still no visit
    assert sampler.visited.tolist() == [False, True]
    sampler.extend(torch.arange(2))
    assert not sampler.visited.any()
    sampler.check_valid()


def test_single_precision_keeps_what_it_rounded() -> None:
    """0.1 rounds up in float32; the running maximum is the rounded one."""
    sampler = VLMPrioritizedSampler(2, td_boost=True, dtype=torch.float32)
    sampler.update_priority(torch.tensor([0]), torch.tensor([0.1], dtype=torch.float64))
    sampler.check_valid()
    beyond = torch.tensor([1e300], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"inf|left out"):  # on a GPU when it is read
        [sampler.update_priority(torch.tensor([0]), beyond), sampler.state_dict()]


def test_td_errors_without_boost_change_no_draw_but_are_kept() -> None:
    score, td_error = facts(SEED)
    sampler = told(VLMPrioritizedSampler(SLOTS, lmbda=0.5), score, td_error)
    before = sampler.probabilities(SLOTS)
    sampler.update_priority(EVERY, torch.linspace(0, 9, SLOTS))
    assert torch.equal(sampler.probabilities(SLOTS), before)
    assert sampler.visited.all()
    assert not sampler.uses_td_error


def test_index_minus_one_is_skipped() -> None:
    sampler = VLMPrioritizedSampler(4, td_boost=True, alpha=1.0, eps=0.0, unscored_priority=1.0)
    sampler.extend(torch.tensor([0, -1, 1, 2, 3]))
    sampler.update_priority(torch.tensor([-1, 2, -1]), torch.tensor([9.0, 5.0, 7.0]))
    sampler.update_score(torch.tensor([-1, 3]), torch.tensor([0.7, 0.2]))
    sampler.update_priority(torch.tensor([-1]), 3.0)
    assert sampler._sum_tree.leaves().tolist() == [1.0, 1.0, 5.0, 0.0]
    assert sampler.default_priority == 5.0
    sampler.check_valid()


def test_a_max_value_writer_marks_what_it_keeps() -> None:
    sampler = VLMPrioritizedSampler(5, lmbda=0.5)
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(5),
        sampler=sampler,
        writer=TensorDictMaxValueWriter(rank_key="key"),
        batch_size=3,
    )
    data = TensorDict({"key": torch.arange(20.0)}, [20])
    buffer.extend(data[torch.randperm(20, generator=torch.Generator().manual_seed(SEED))])
    assert sorted(buffer[:]["key"].tolist()) == [15, 16, 17, 18, 19]
    sampler.check_valid()
    assert written(sampler) == 5
    buffer.sample()


def test_a_storage_that_came_filled_is_unscored() -> None:
    storage = LazyTensorStorage(6)
    ReplayBuffer(storage=storage, batch_size=2).extend(torch.arange(4))
    for attach in (
        lambda s: ReplayBuffer(storage=storage, sampler=s, batch_size=2).sample(),
        lambda s: s.sample(storage, 2),
    ):
        sampler = VLMPrioritizedSampler(6, lmbda=1.0)
        attach(sampler)
        assert written(sampler) == 4
        assert not sampler.scored.any()
        sampler.check_valid()


@pytest.mark.parametrize("within", [False, True])
def test_rows_that_are_gone_from_the_storage_are_forgotten(within: bool) -> None:
    sampler = VLMPrioritizedSampler(
        6, td_boost=True, alpha=1.0, eps=0.0, max_priority_within_buffer=within
    )
    sampler.extend(torch.arange(6))
    sampler.update_score(torch.arange(6), 1.0)
    sampler.update_priority(torch.arange(6), torch.arange(1.0, 7.0))
    index, info = sampler.sample(Slots(2), 200)  # another buffer has emptied it and begun anew
    assert set(index.tolist()) == {0, 1}
    q = torch.tensor([1 / 4 + 1 / 6, 1 / 4 + 1 / 3], dtype=torch.float64)  # |δ| is 1 and 2
    torch.testing.assert_close(info["sampling_probability"], q[index])
    assert sampler.default_priority == (2.0 if within else 6.0)
    assert sampler.statistics(2)["share_positive"] == 1.0
    sampler.check_valid()


@pytest.mark.parametrize("tell", ["update_score", "update_priority"])
def test_a_slot_that_nobody_announced_counts_as_written_once_it_is_told_of(tell: str) -> None:
    sampler = VLMPrioritizedSampler(6, lmbda=1.0, td_boost=True, unscored_priority=0.5)
    getattr(sampler, tell)(torch.tensor([4, 4, 2]), torch.tensor([0.5, 0.25, 0.75]))
    assert written(sampler) == 2
    sampler.check_valid()


@pytest.mark.parametrize("tell", ["update_score", "update_priority"])
def test_an_announcement_after_the_writers_is_skipped_only_if_nothing_came_between(
    tell: str,
) -> None:
    sampler = VLMPrioritizedSampler(6)
    index = torch.arange(6)
    sampler.mark_update(index)
    getattr(sampler, tell)(index, 0.5)
    sampler.extend(index)
    assert not (sampler.scored | sampler.visited).any()
    sampler.check_valid()


def test_emptying_a_buffer_forgets_everything() -> None:
    sampler = VLMPrioritizedSampler(6, lmbda=1.0)
    buffer = ReplayBuffer(storage=LazyTensorStorage(6), sampler=sampler, batch_size=2)
    index = buffer.extend(torch.arange(6))
    sampler.update_score(index, 1.0)
    sampler.update_priority(index, 7.0)
    buffer.empty()
    assert written(sampler) == sampler._positive == 0
    assert sampler._sum_tree.total() == 0.0
    assert sampler.default_priority == 1.0
    with pytest.raises(RuntimeError, match="Cannot sample from an empty storage"):
        buffer.sample()


@pytest.mark.parametrize("within", [False, True])
def test_the_running_maximum_is_over_all_time_or_over_the_buffer(within: bool) -> None:
    sampler = VLMPrioritizedSampler(3, td_boost=True, max_priority_within_buffer=within)
    sampler.extend(torch.arange(3))
    sampler.update_priority(torch.arange(3), torch.tensor([5.0, 9.0, 7.0]))
    sampler.extend(torch.tensor([1]))
    assert sampler.default_priority == (7.0 if within else 9.0)
    sampler.update_priority(torch.tensor([2]), 1.0)
    assert sampler.default_priority == (5.0 if within else 9.0)


def test_slots_of_a_storage_of_two_dimensions_are_drawn_scored_and_visited() -> None:
    sampler = VLMPrioritizedSampler(
        40, lmbda=1.0, alpha=1.0, eps=0.0, td_boost=True, unscored_priority=1.0
    )
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(40, ndim=2), sampler=sampler, dim_extend=0, batch_size=500
    )
    buffer.extend(torch.arange(40).reshape(10, 4))
    index = torch.tensor([[0, 1], [9, 3]])
    sampler.update_priority(index, torch.tensor([30.0, 10.0]), storage=buffer.storage)
    sampler.check_valid()
    leaves = sampler._sum_tree.leaves().reshape(buffer.storage.shape)
    assert leaves[0, 1] == 30.0
    assert leaves[9, 3] == 10.0
    data, info = buffer.sample(return_info=True)
    rows, columns = info["index"]
    assert torch.equal(data, buffer.storage.get((rows, columns)))
    np.testing.assert_allclose(
        info["sampling_probability"], leaves[rows, columns] / leaves.sum(), rtol=1e-9
    )
    sampler.update_score((rows, columns), 0.0, storage=buffer.storage)
    assert sampler.scored.reshape(leaves.shape)[rows, columns].all()
    sampler.check_valid()
