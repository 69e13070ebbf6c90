"""AER: what is kept of the draws is what is most like the state of now."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ListStorage, RandomSampler, TensorDictReplayBuffer

from tests.samplers.sampler_facts import SEED, SLOTS, chi_square
from vlmrb_torchrl import VLMReplayBuffer
from vlmrb_torchrl.samplers import AttentiveSampler
from vlmrb_torchrl.samplers.attentive import similarity

KINDS = pytest.mark.parametrize("kind", [VLMReplayBuffer, TensorDictReplayBuffer])
ANGLES = torch.linspace(0, 3, SLOTS)  # of slots 0, 1, 2 … from the first one: the ranks


def on_a_circle(angles: torch.Tensor) -> torch.Tensor:
    """States of any length, of which only the direction counts."""
    length = 1 + torch.rand(len(angles), 1, generator=torch.Generator().manual_seed(SEED))
    return length * torch.stack([angles.cos(), angles.sin()], -1)


def filled(kind: Any, sampler: Any, batch_size: int, storage: Any = LazyTensorStorage) -> Any:
    buffer = kind(storage=storage(SLOTS), sampler=sampler, batch_size=batch_size)
    buffer.set_rng(torch.Generator().manual_seed(SEED))
    buffer.extend(TensorDict({"observation": on_a_circle(ANGLES)}, [SLOTS]))
    return buffer


@pytest.mark.parametrize("lmbda", [4.0, 2.5])
def test_the_slot_that_one_item_has_is_the_most_similar_of_its_draws(lmbda: float) -> None:
    """The best of n draws is among the r most similar slots in 1 - (1 - r/N)^n of cases."""
    sampler = AttentiveSampler(lmbda)
    storage = filled(VLMReplayBuffer, sampler, 1).storage
    sampler.observe(on_a_circle(ANGLES[:1]))
    drawn = torch.cat([sampler.sample(storage, 1)[0] for _ in range(4000)])
    n, ranks = math.ceil(lmbda), np.arange(SLOTS + 1)
    assert chi_square(drawn, np.diff(1 - (1 - ranks / SLOTS) ** n)) > 1e-3


@pytest.mark.parametrize(("lmbda", "batch_size"), [(2.0, 32), (1.1, 100), (1.5, 7)])
def test_of_a_batch_as_many_are_similar_as_the_closed_form_says(
    lmbda: float, batch_size: int
) -> None:
    """Of n = ⌈λ k⌉ draws Bin(n, r/N) are of the r most similar slots, and k of them are kept."""
    candidates = set()

    def compared(states: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        candidates.add(len(states))
        return similarity(states, state)

    sampler = AttentiveSampler(lmbda, similarity=compared)
    storage = filled(VLMReplayBuffer, sampler, batch_size).storage
    sampler.observe(on_a_circle(ANGLES[:1]))
    batches = torch.stack([sampler.sample(storage, batch_size)[0] for _ in range(1500)])
    assert batches.shape[1] == batch_size
    n = {(2.0, 32): 64, (1.1, 100): 110, (1.5, 7): 11}[lmbda, batch_size]
    assert candidates == {n}
    for rank in (1, SLOTS // 4, SLOTS // 2, SLOTS - 3):
        among = stats.binom(n, rank / SLOTS)
        kept = np.minimum(np.arange(n + 1), batch_size)
        mean = among.expect(lambda x: np.minimum(x, batch_size))
        spread = math.sqrt(among.pmf(np.arange(n + 1)) @ (kept - mean) ** 2 / len(batches))
        assert (batches < rank).sum(1).double().mean().item() == pytest.approx(
            mean, abs=4 * spread + 1e-9
        )


@pytest.mark.parametrize("why", ["λ is 1", "nothing was observed"])
@KINDS
def test_else_it_is_torchrl_s_random_sampler_number_for_number(kind: Any, why: str) -> None:
    sampler = AttentiveSampler(1.0 if why == "λ is 1" else 3.0)
    buffer, uniform = (filled(kind, each, 16) for each in (sampler, RandomSampler()))
    if why == "λ is 1":
        sampler.observe(on_a_circle(ANGLES[:1]))
    for _ in range(3):
        assert torch.equal(buffer.sample()["index"], uniform.sample()["index"])


def test_several_games_have_their_turn_one_a_batch() -> None:
    sampler = AttentiveSampler(60.0)
    buffer = filled(VLMReplayBuffer, sampler, 2)
    places = (3, SLOTS // 2, SLOTS - 4)
    sampler.observe(on_a_circle(ANGLES[list(places)]))
    for place in (*places, *places):
        assert (buffer.sample()["index"] - place).abs().max() <= 3


def test_codes_of_a_grid_are_compared_by_the_share_that_agrees() -> None:
    """With the cosine the second of these rows would be the nearest to the first."""
    grid = torch.tensor([[1, 2, 0, 9], [2, 4, 1, 18], [1, 2, 0, 0], [9, 2, 0, 0]]).byte()
    sampler = AttentiveSampler(60.0)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(3), sampler=sampler, batch_size=4)
    buffer.extend(TensorDict({"observation": grid[1:]}, [3]))
    sampler.observe(grid[:1])
    assert buffer.sample()["index"].tolist() == [1] * 4


def test_an_overwritten_slot_is_judged_by_what_lies_there_now() -> None:
    sampler = AttentiveSampler(60.0)
    buffer = filled(VLMReplayBuffer, sampler, 2)
    sampler.observe(on_a_circle(ANGLES[:1]))
    assert buffer.sample()["index"].max() < 4
    buffer.extend(TensorDict({"observation": -on_a_circle(ANGLES[:4])}, [4]))
    assert 4 <= buffer.sample()["index"].min() <= buffer.sample()["index"].max() < 10


def test_a_short_buffer_is_drawn_from_again_and_again_and_an_empty_one_not_at_all() -> None:
    sampler = AttentiveSampler(2.0)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(9), sampler=sampler, batch_size=8)
    sampler.observe(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample()
    buffer.extend(TensorDict({"observation": torch.ones(1, 2)}, [1]))
    assert buffer.sample()["index"].tolist() == [0] * 8


@pytest.mark.parametrize("storage", ["of two dimensions", "a list"])
def test_other_storages_are_drawn_from_as_well(storage: str) -> None:
    sampler = AttentiveSampler(60.0)
    states = on_a_circle(ANGLES)
    sampler.observe(states[:1])
    if storage == "a list":
        buffer = filled(TensorDictReplayBuffer, sampler, 2, ListStorage)
    else:
        buffer = VLMReplayBuffer(
            storage=LazyTensorStorage(SLOTS, ndim=2), sampler=sampler, batch_size=2
        )
        buffer.extend(TensorDict({"observation": states.view(4, -1, 2)}, [4, SLOTS // 4]))
    near = torch.cat([buffer.sample()["observation"] for _ in range(3)])
    assert torch.cosine_similarity(near, states[:1]).min() > 0.9


def test_a_restored_sampler_draws_the_same(tmp_path: Any) -> None:
    sampler, again, third = AttentiveSampler(5.0), AttentiveSampler(2.0), AttentiveSampler(2.0)
    buffer, other, last = (filled(VLMReplayBuffer, each, 8) for each in (sampler, again, third))
    sampler.observe(on_a_circle(ANGLES[10:13]))
    buffer.sample()  # the second game's turn
    again.load_state_dict(sampler.state_dict())
    sampler.dumps(tmp_path / "sampler")
    third.loads(tmp_path / "sampler")
    for each in (buffer, other, last):
        each.set_rng(torch.Generator().manual_seed(1))
    drawn = buffer.sample()["index"]
    assert torch.equal(drawn, other.sample()["index"])
    assert torch.equal(drawn, last.sample()["index"])


def test_a_state_of_another_shape_is_refused() -> None:
    sampler = AttentiveSampler()
    buffer = filled(VLMReplayBuffer, sampler, 2)
    sampler.observe(torch.zeros(1, 3))
    with pytest.raises(
        ValueError, match=r"observed state is torch.float32 \[3\]: \[2\] are stored"
    ):
        buffer.sample()
