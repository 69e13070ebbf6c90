"""ERO: draws are uniform over the mask, and the policy of the masks climbs its closed gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ListStorage, TensorDictReplayBuffer

from tests.samplers.sampler_facts import EVERY, SEED, SLOTS, chi_square
from vlmrb_torchrl import VLMReplayBuffer
from vlmrb_torchrl.samplers import OptimizedSampler

KINDS = pytest.mark.parametrize("kind", [VLMReplayBuffer, TensorDictReplayBuffer])


def rows(number: int, reward: float = 0.0) -> TensorDict:
    return TensorDict({"next": {"reward": torch.full((number, 1), reward)}}, [number])


def filled(sampler: Any, kind: Any = VLMReplayBuffer, batch_size: int = 16) -> Any:
    buffer = kind(
        storage=LazyTensorStorage(SLOTS),
        sampler=sampler,
        batch_size=batch_size,
        priority_key="td_error",
    )
    buffer.set_rng(torch.Generator().manual_seed(SEED))
    buffer.extend(rows(SLOTS))
    return buffer


def episode(sampler: OptimizedSampler, earned: float) -> None:
    """One game's episode of one step."""
    sampler.observe(torch.tensor([[earned]]), torch.tensor([[True]]))


def visit(buffer: Any, td_error: torch.Tensor) -> None:
    buffer.update_priority(EVERY, td_error)


@KINDS
def test_draws_are_uniform_over_the_mask_and_the_mask_follows_the_scores(kind: Any) -> None:
    """The policy is set to φ = 1/4 for |δ| = 0 and 3/4 for |δ| = 1, whatever reward and age."""
    sampler = OptimizedSampler(SLOTS, hidden_features=[])
    buffer = filled(sampler, kind, batch_size=20_000)
    (layer,) = sampler.policy
    layer.weight.data.copy_(torch.tensor([[0.0, 2 * math.log(3), 0.0]]))
    layer.bias.data.fill_(-math.log(3))
    visit(buffer, (EVERY % 2).float())
    masks = []
    for _ in range(400):
        episode(sampler, 0.0)  # nothing is learnt: no change
        masks.append(sampler.mask)
    q = sampler.mask.double() / sampler.mask.sum()
    drawn = buffer.sample()["index"]
    assert set(drawn.tolist()) == set(sampler.mask.nonzero().squeeze(-1).tolist())
    counted = torch.bincount(drawn, minlength=SLOTS)[sampler.mask]
    uniform = np.full(len(counted), 1 / len(counted))
    assert chi_square(torch.repeat_interleave(torch.arange(len(counted)), counted), uniform) > 1e-3
    assert q.sum() == pytest.approx(1)
    share = torch.stack(masks).float().mean(0)
    expected = torch.where(EVERY % 2 == 1, 0.75, 0.25)
    assert (share - expected).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 400)
    assert sampler.statistics(SLOTS)["mean_score"] == pytest.approx(0.5)
    share_drawn = sampler.statistics(SLOTS)["effective_sample_size"]
    assert share_drawn == pytest.approx(float(sampler.mask.float().mean()))


@pytest.mark.parametrize("change", [2.0, -3.0])
def test_the_policy_s_gradient_is_the_change_of_the_return_times_that_of_the_masks_likelihood(
    change: float,
) -> None:
    """Of a linear φ: -r Σ_j (I_j - φ_j) f_j over the transitions drawn, here all of one kind."""
    sampler = OptimizedSampler(SLOTS, hidden_features=[], policy_batch_size=1000)
    buffer = filled(sampler)
    visit(buffer, torch.full((SLOTS,), 2.0))
    sampler._features[:, 2] = 0.25  # of one age
    episode(sampler, 1.0)  # the first return: no change yet, but a mask
    assert not any(weight.any() for weight in sampler.policy.parameters())
    assert 0 < sampler.mask.sum() < SLOTS
    drawn: list[torch.Tensor] = []
    among = sampler._among
    sampler._among = lambda *given: drawn.append(among(*given)) or drawn[-1]  # type: ignore
    mask = sampler.mask
    episode(sampler, 1.0 + change)
    (slots,) = drawn
    likelihood = (mask[slots].float() - 0.5).sum()
    (layer,) = sampler.policy
    features = torch.tensor([[0.0, 2.0, 0.25]])
    torch.testing.assert_close(layer.weight.grad, -change * likelihood * features)
    torch.testing.assert_close(layer.bias.grad, (-change * likelihood).reshape(1))


def test_the_policy_learns_to_replay_what_raises_the_return() -> None:
    """Here large |δ| in the mask: a step of 0.02 leads upwards in two cases of three or so."""
    sampler = OptimizedSampler(SLOTS, hidden_features=[], learning_rate=0.02)
    buffer = filled(sampler)
    td_error = (EVERY % 2).float()
    for _ in range(300):
        visit(buffer, td_error)
        mask = sampler.mask.float()
        episode(sampler, float((mask * (td_error - 0.5)).sum()))
    score = sampler._score
    assert score[td_error == 1].mean() > score[td_error == 0].mean() + 0.3


def test_features_are_reward_td_error_and_age_as_a_share_of_the_capacity() -> None:
    sampler = OptimizedSampler(4)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=2)
    buffer.extend(rows(3, reward=7.0))
    buffer.update_priority(torch.tensor([0, 2]), torch.tensor([[0.5], [1.5]]))
    assert sampler._features.tolist() == [[7, 0.5, 0.5], [0, 0, 0], [7, 1.5, 0], [0, 0, 0]]
    buffer.extend(rows(2, reward=-1.0))  # slots 3 and 0
    assert sampler._features[0].tolist() == [0, 0, 0]
    buffer.update_priority(torch.tensor([0, 1, 3]), torch.ones(3))
    assert sampler._features.tolist() == [[-1, 1, 0], [7, 1, 0.75], [7, 1.5, 0], [-1, 1, 0.25]]


@pytest.mark.parametrize("unvisited_score", [1.0, 0.3, 0.0])
def test_an_overwritten_slot_is_as_one_that_was_never_visited(unvisited_score: float) -> None:
    sampler = OptimizedSampler(SLOTS, unvisited_score=unvisited_score)
    buffer = filled(sampler)
    visit(buffer, torch.ones(SLOTS))
    episode(sampler, 0.0)
    assert (sampler._score == 0.5).all()
    visit(buffer, torch.ones(SLOTS))
    masks = []
    for _ in range(300):
        buffer.extend(rows(SLOTS // 2))
        masks.append(sampler.mask)
    assert (sampler._score == unvisited_score).all()
    assert not (sampler._stale | sampler._scored).any()
    share = torch.stack(masks)[SLOTS:].float().mean().item()
    assert share == pytest.approx(unvisited_score, abs=0.02)


def test_returns_are_summed_over_calls_and_averaged_over_games_that_end_together() -> None:
    sampler = OptimizedSampler(4)
    reward = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    over = torch.zeros(2, 3, dtype=torch.bool)
    sampler.observe(reward, over)
    assert sampler._return is None
    over[0, 1] = over[1, 2] = True
    sampler.observe(reward, over)  # 1 + 2 + 3 + 1 + 2, and 60 + 60
    assert sampler._return == pytest.approx((9 + 120) / 2)
    assert sampler._playing.tolist() == [3.0, 0.0]


def test_while_the_mask_is_empty_all_slots_are_drawn_alike() -> None:
    sampler = OptimizedSampler(SLOTS, unvisited_score=0.0)
    buffer = filled(sampler, batch_size=20_000)
    assert not sampler.mask.any()
    assert chi_square(buffer.sample()["index"], np.full(SLOTS, 1 / SLOTS)) > 1e-3
    assert sampler.statistics(SLOTS)["effective_sample_size"] == 1


def test_a_short_buffer_and_one_that_came_with_rows_are_drawn_from_and_an_empty_one_is_not() -> (
    None
):
    sampler = OptimizedSampler(8)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(8), sampler=sampler, batch_size=64)
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample()
    assert sampler.statistics(0)["mean_score"] == 0
    buffer.extend(rows(3))
    assert set(buffer.sample()["index"].tolist()) == {0, 1, 2}
    buffer.empty()
    buffer.extend(rows(2))
    assert set(buffer.sample()["index"].tolist()) == {0, 1}
    late = OptimizedSampler(8)
    other = VLMReplayBuffer(storage=buffer.storage, sampler=late, batch_size=64)
    assert set(other.sample()["index"].tolist()) == {0, 1}
    assert not late._stale.any()


@pytest.mark.parametrize("storage", ["of two dimensions", "a list"])
def test_other_storages_are_drawn_from_as_well(storage: str) -> None:
    sampler = OptimizedSampler(12)
    if storage == "a list":
        buffer: Any = TensorDictReplayBuffer(
            storage=ListStorage(12), sampler=sampler, batch_size=64, priority_key="td_error"
        )
        buffer.extend(rows(12, reward=5.0))
    else:
        buffer = VLMReplayBuffer(
            storage=LazyTensorStorage(12, ndim=2), sampler=sampler, batch_size=64
        )
        buffer.extend(rows(12, reward=5.0).reshape(3, 4))
    batch = buffer.sample()
    buffer.update_tensordict_priority(batch.set("td_error", torch.ones(64)))
    assert sampler._stale.sum() == len(batch["index"].unique(dim=0))
    assert (sampler._features[sampler._stale][:, :2] == torch.tensor([5.0, 1.0])).all()


def history(buffer: Any, steps: int) -> None:
    """Everything that can happen, from the buffer's own generator."""
    for step in range(steps):
        batch = buffer.sample()
        buffer.update_tensordict_priority(batch.set("td_error", batch["index"].float()))
        buffer.extend(rows(5, reward=float(step)))
        buffer.sampler.observe(torch.full((2, 3), float(step)), torch.eye(2, 3).bool())


@pytest.mark.parametrize("by", ["state", "files"])
def test_a_restored_sampler_goes_on_bit_equal(by: str, tmp_path: Any) -> None:
    buffer = filled(OptimizedSampler(SLOTS, learning_rate=0.01))
    history(buffer, 5)
    other = filled(OptimizedSampler(SLOTS, learning_rate=0.01))
    if by == "state":
        other.load_state_dict(buffer.state_dict())
    else:
        buffer.dumps(tmp_path)
        other.loads(tmp_path)
    for each in (buffer, other):
        each.set_rng(torch.Generator().manual_seed(1))
        history(each, 5)
    for name, mine in buffer.sampler.state_dict().items():
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, other.sampler.state_dict()[name]), name
    assert all(
        map(torch.equal, buffer.sampler.policy.parameters(), other.sampler.policy.parameters())
    )
    assert any(weight.any() for weight in buffer.sampler.policy[-1].parameters())


def test_what_cannot_be_is_refused_and_leaves_no_trace() -> None:
    sampler = OptimizedSampler(SLOTS)
    buffer = filled(sampler)
    before = {name: str(each) for name, each in sampler.state_dict().items()}
    for index, priority in (
        ([0, 1], [0.5, math.nan]),
        ([0, 1], [0.5, math.inf]),
        ([0, 1], [-0.5, 0.5]),
        ([0, 1], [0.5, 0.5, 0.5]),
        ([0, SLOTS], [0.5, 0.5]),
        ([-2, 1], [0.5, 0.5]),
    ):
        with pytest.raises((ValueError, IndexError)) as refusal:
            sampler.update_priority(
                torch.tensor(index), torch.tensor(priority), storage=buffer.storage
            )
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="storage is None: pass that of the buffer"):
        sampler.update_priority(torch.tensor([0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"done is .*: pass \[1 games, steps\]"):
        sampler.observe(torch.zeros(1, 3), torch.zeros(2, 3).bool())
    with pytest.raises(ValueError, match=r"sampler state is .*: pass one of 48 slots"):
        sampler.load_state_dict(OptimizedSampler(3).state_dict())
    assert {name: str(each) for name, each in sampler.state_dict().items()} == before
