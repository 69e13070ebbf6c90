"""What is drawn: the mixture, its weights, and where its chance comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.data.replay_buffers.scheduler import LinearScheduler

from tests.samplers.sampler_facts import (
    EVERY,
    SEED,
    SLOTS,
    Slots,
    chi_square,
    facts,
    mixture,
    on,
    told,
)
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.samplers.trees import CompiledSumTree, RadixSumTree

pytestmark = pytest.mark.usefixtures("place")


@pytest.mark.parametrize("tree", [CompiledSumTree, RadixSumTree])
@pytest.mark.parametrize("td_boost", [False, True])
@pytest.mark.parametrize("lmbda", [0.3, 1.0])
@pytest.mark.parametrize(
    ("threshold", "negative_priority", "unscored_priority", "dtype"),
    [
        (0.5, 0.0, 0.0, torch.float64),
        (0.5, 0.1, 0.3, torch.float64),
        (None, 0.0, 0.2, torch.float32),
        (None, 0.1, 0.2, torch.float64),
    ],
)
def test_draws_follow_the_mixture(
    tree: type,
    td_boost: bool,
    lmbda: float,
    threshold: float | None,
    negative_priority: float,
    unscored_priority: float,
    dtype: torch.dtype,
) -> None:
    # ε is large enough for every slot to be expected 5 times and more, as χ² wants.
    arguments: dict[str, Any] = {
        "lmbda": lmbda,
        "td_boost": td_boost,
        "threshold": threshold,
        "negative_priority": negative_priority,
        "unscored_priority": unscored_priority,
        "alpha": 0.6,
        "eps": 1e-2,
    }
    score, td_error = facts(SEED)
    sampler = on(
        tree, told(VLMPrioritizedSampler(SLOTS, dtype=dtype, **arguments), score, td_error)
    )
    sampler._rng = torch.Generator().manual_seed(SEED)
    q = mixture(score, td_error, **arguments)
    batches = [sampler.sample(Slots(SLOTS), 4096) for _ in range(32)]
    drawn = torch.cat([index for index, _ in batches])
    p_value = chi_square(drawn, q)
    print(f"seed {SEED}: p-value {p_value:.3f}")
    assert p_value > 1e-3
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for index, info in batches:
        np.testing.assert_allclose(info["sampling_probability"], q[index], rtol=exact)
    np.testing.assert_allclose(sampler.probabilities(SLOTS), q, rtol=exact)
    sampler.check_valid()


def test_priority_of_a_no_leads_from_the_papers_boost_to_prioritized_replay() -> None:
    """At 1 every score counts as none; at 0 a No has ε alone; q of a No rises in between."""
    score, td_error = facts(SEED)
    boosted: dict[str, Any] = {"lmbda": 1.0, "td_boost": True, "eps": 1e-6}
    no = (score < 0.5).numpy()
    share = []
    for of_no in (0.0, 0.1, 0.5, 1.0):
        sampler = VLMPrioritizedSampler(
            SLOTS, negative_priority=of_no, unscored_priority=1.0, **boosted
        )
        share.append(float(told(sampler, score, td_error).probabilities(SLOTS)[no].sum()))
        assert sampler.positive.tolist() == (score >= 0.5).tolist()
    assert share[0] < 1e-3 < share[1] < share[2] < share[3]
    per = VLMPrioritizedSampler(SLOTS, unscored_priority=1.0, **boosted)
    q = told(per, torch.full_like(score, torch.nan), td_error).probabilities(SLOTS)
    torch.testing.assert_close(sampler.probabilities(SLOTS), q, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("tree", [CompiledSumTree, RadixSumTree])
def test_chi_square_would_notice_a_mixture_one_percent_off(tree: type) -> None:
    """The test above has power: draws at λ = 0.3 are told from λ = 0.33."""
    score, td_error = facts(SEED)
    sampler = on(tree, told(VLMPrioritizedSampler(SLOTS, lmbda=0.33), score, td_error))
    sampler._rng = torch.Generator().manual_seed(SEED)
    drawn = torch.cat([sampler.sample(Slots(SLOTS), 4096)[0] for _ in range(32)])
    arguments = {"lmbda": 0.3, "td_boost": False, "threshold": 0.5, "unscored_priority": 0.0}
    assert chi_square(drawn, mixture(score, td_error, alpha=0.6, eps=1e-12, **arguments)) < 1e-6


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("positive", [False, True])
def test_both_trees_draw_the_same_from_the_same_numbers(lmbda: float, positive: bool) -> None:
    score, td_error = facts(SEED)
    drawn = []
    for tree in (CompiledSumTree, RadixSumTree):
        sampler = VLMPrioritizedSampler(SLOTS, lmbda=lmbda, beta=0.5, td_boost=True)
        sampler = on(tree, told(sampler, score * positive, td_error))
        sampler._rng = torch.Generator().manual_seed(SEED)
        drawn.append(sampler.sample(Slots(SLOTS), 4096))
    (index, info), (same, same_info) = drawn
    assert torch.equal(index, same)
    torch.testing.assert_close(info, same_info)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_weight_is_the_power_of_n_times_q(beta: float, lmbda: float) -> None:
    score, td_error = facts(SEED)
    sampler = told(VLMPrioritizedSampler(SLOTS, lmbda=lmbda, beta=beta, eps=1e-3), score, td_error)
    _, info = sampler.sample(Slots(SLOTS), 256)
    assert info["priority_weight"].dtype == torch.float32
    assert info["sampling_probability"].dtype == torch.float64
    torch.testing.assert_close(
        info["priority_weight"].double(),
        (SLOTS * info["sampling_probability"]) ** -beta,
        rtol=1e-6,
        atol=0.0,
    )
    if lmbda < 1.0:
        assert info["priority_weight"].max() <= (1.0 - lmbda) ** -beta * (1.0 + 1e-6)


@pytest.mark.parametrize("threshold", [0.5, None])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("td_boost", [False, True])
@pytest.mark.parametrize("some_scored", [False, True])
def test_without_a_positive_draws_are_exactly_uniform(
    threshold: float | None, eps: float, td_boost: bool, some_scored: bool
) -> None:
    sampler = VLMPrioritizedSampler(
        SLOTS, lmbda=1.0, beta=1.0, threshold=threshold, eps=eps, td_boost=td_boost
    )
    sampler._rng = torch.Generator().manual_seed(SEED)
    sampler.extend(EVERY)
    sampler.update_priority(EVERY, torch.linspace(0.0, 9.0, SLOTS))
    if some_scored:
        sampler.update_score(EVERY[::2], 0.0)
    index, info = sampler.sample(Slots(SLOTS), 20_000)
    assert (info["sampling_probability"] == 1.0 / SLOTS).all()
    assert (info["priority_weight"] == 1.0).all()
    assert chi_square(index, np.full(SLOTS, 1.0 / SLOTS)) > 1e-3


def test_unscored_slots_with_a_priority_of_their_own_count_as_positive() -> None:
    sampler = VLMPrioritizedSampler(4, lmbda=1.0, unscored_priority=0.5, alpha=1.0, eps=0.0)
    sampler.extend(torch.arange(4))
    sampler.update_score(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
    np.testing.assert_allclose(sampler.probabilities(4), [0.5, 0.0, 0.25, 0.25])


def test_the_last_positive_to_be_overwritten_leaves_uniform_replay() -> None:
    sampler = VLMPrioritizedSampler(4, lmbda=1.0)
    sampler.extend(torch.arange(4))
    sampler.update_score(torch.tensor([2]), 1.0)
    assert sampler.probabilities(4)[2] > 0.99
    sampler.extend(torch.tensor([2]))
    assert (sampler.probabilities(4) == 0.25).all()
    sampler.check_valid()


@pytest.mark.parametrize("eps", [0.0, 1e-300])
def test_under_tiny_eps_a_slot_without_mass_is_never_drawn(eps: float) -> None:
    """The one positive slot is drawn though 10,000 empty or zero slots surround it."""
    sampler = VLMPrioritizedSampler(10_000, lmbda=1.0, eps=eps)
    sampler.extend(torch.arange(9_000))
    sampler.update_score(torch.arange(9_000), (torch.arange(9_000) == 4321).float())
    index, info = sampler.sample(Slots(9_000), 5_000)
    assert (index == 4321).all()
    assert info["sampling_probability"].isfinite().all()


def test_share_of_one_clip_among_a_million_zeros() -> None:
    """32 powers of 1 against a million of ε: 32 / (32 + 1e6 ε^0.6), so 32 / 47.8 at 1e-8."""
    slots = 1_000_000
    sampler = VLMPrioritizedSampler(slots, lmbda=1.0, eps=1e-8)
    sampler.extend(torch.arange(slots))
    sampler.update_score(torch.arange(slots), (torch.arange(slots) < 32).float())
    assert float(sampler.probabilities(slots)[:32].sum()) == pytest.approx(32 / 47.8, abs=1e-3)


@pytest.mark.parametrize("greatest", [0.5, 5.0])
def test_with_lambda_one_it_is_torchrls_prioritized_sampler(greatest: float) -> None:
    """Leaf for leaf through a random history; weights up to the factor of TorchRL's minimum.

    Where every |δ| is below 1, that is what stands in for |δ| of a slot never visited.

    In single precision, TorchRL's default: in double its ``mark_update`` raises.
    """
    print("seed", SEED)
    rng = torch.Generator().manual_seed(SEED)
    same: dict[str, Any] = {"alpha": 0.7, "beta": 0.5, "eps": 1e-8, "dtype": torch.float32}
    ours = VLMPrioritizedSampler(SLOTS, lmbda=1.0, td_boost=True, unscored_priority=1.0, **same)
    theirs = PrioritizedSampler(SLOTS, **same)
    for step in range(200):
        index = torch.randint(SLOTS, (16,), generator=rng)
        delta = greatest * torch.rand(16, generator=rng)
        for sampler in (ours, theirs):
            if step % 3 == 0:
                sampler.mark_update((torch.arange(9) + index[0]) % SLOTS)
            else:
                sampler.update_priority(index, delta)
    torch.testing.assert_close(ours._sum_tree.leaves(), theirs._sum_tree[EVERY], rtol=1e-6, atol=0)
    assert float(ours.default_priority) == float(theirs.default_priority)
    ours.check_valid()
    ratio = torch.full((2, SLOTS), torch.nan)
    for row, sampler in enumerate((ours, theirs)):
        index, info = sampler.sample(Slots(SLOTS), 2048)
        ratio[row, index] = info["priority_weight"]
    ratios = (ratio[0] / ratio[1])[ratio.isfinite().all(0)]
    assert len(ratios) > SLOTS // 2
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("name", "start", "end"), [("lmbda", 0.0, 0.5), ("lmbda", 0.5, 0.0), ("beta", 0.4, 1.0)]
)
def test_torchrls_linear_scheduler_drives_lambda_and_beta(
    name: str, start: float, end: float
) -> None:
    sampler = VLMPrioritizedSampler(8, **{name: start})
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), sampler=sampler)
    scheduler = LinearScheduler(buffer, name, end, 4)
    seen = []
    for _ in range(6):
        scheduler.step()
        seen.append(getattr(sampler, name))
    expected = [start + (end - start) * min(step, 4) / 4 for step in range(1, 7)]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("td_boost", False),
        ("td_boost", True),
        ("threshold", 0.9),
        ("threshold", None),
        ("negative_priority", 0.2),
        ("negative_priority", 1.0),
        ("unscored_priority", 0.3),
        ("unscored_priority", 0.0),
        ("alpha", 0.9),
    ],
)
def test_a_setting_changed_later_is_as_one_from_the_start(
    name: str, value: Any, dtype: torch.dtype
) -> None:
    arguments: dict[str, Any] = {"lmbda": 0.3, "threshold": 0.5, "eps": 1e-3, "dtype": dtype}
    for start in ({}, {"td_boost": True, "unscored_priority": 0.2}):
        before = {"td_boost": False, "unscored_priority": 0.0, "alpha": 0.6, **start}
        sampler = told(VLMPrioritizedSampler(SLOTS + 8, **arguments, **before), *facts(SEED))
        setattr(sampler, name, value)
        assert getattr(sampler, name) == value
        sampler.check_valid()
        assert sampler._sum_tree.leaves()[SLOTS:].eq(0).all()  # never written: no mass
        after = {**arguments, **before, name: value}
        q = mixture(*facts(SEED), **{k: v for k, v in after.items() if k != "dtype"})
        exact = 1e-12 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(sampler.probabilities(SLOTS), q, rtol=exact)
        fresh = told(VLMPrioritizedSampler(SLOTS + 8, **after), *facts(SEED))
        assert sampler.statistics(SLOTS) == pytest.approx(fresh.statistics(SLOTS))
        sampler.load_state_dict(fresh.state_dict())  # of the same make now


def test_draws_come_from_the_buffers_generator_and_from_no_other() -> None:
    def draws(seed: int) -> Tensor:
        sampler = told(VLMPrioritizedSampler(SLOTS, lmbda=0.5), *facts(SEED))
        generator = torch.Generator().manual_seed(seed)
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(SLOTS), sampler=sampler, generator=generator, batch_size=64
        )
        buffer.extend(EVERY)
        return torch.cat([buffer.sample() for _ in range(5)])

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_without_a_generator_torchs_global_one_decides() -> None:
    sampler = told(VLMPrioritizedSampler(SLOTS, lmbda=0.5), *facts(SEED))
    draws = []
    for _ in range(2):
        torch.manual_seed(SEED)
        draws.append(sampler.sample(Slots(SLOTS), 64)[0])
    assert torch.equal(*draws)


def test_a_score_equal_to_the_threshold_is_a_yes() -> None:
    sampler = VLMPrioritizedSampler(4, threshold=0.5)
    sampler.extend(torch.arange(4))
    score = torch.tensor([0.5, 0.5 - 1e-9, 0.5 + 1e-9], dtype=torch.float64)
    sampler.update_score(torch.arange(3), score)
    assert sampler.positive.tolist() == [True, False, True, False]
