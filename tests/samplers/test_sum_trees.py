"""Both sum trees keep the same promises."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.samplers.trees import (
    CompiledSumTree,
    RadixSumTree,
    SumTree,
    last_of_duplicates,
    make_sum_tree,
)

TREES = [CompiledSumTree, RadixSumTree]
DTYPES = [torch.float32, torch.float64]
Maker = Callable[[int, torch.dtype], SumTree]
both_trees = pytest.mark.parametrize("make", TREES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Whole numbers sum exactly in either precision, so every expectation on them is an equality.
whole_leaves = st.lists(st.integers(0, 9), min_size=1, max_size=70)
any_leaves = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-12, 1e12, allow_nan=False)), min_size=1, max_size=70
).filter(any)


def planted(make: Maker, leaves: list[float], dtype: torch.dtype) -> SumTree:
    tree = make(len(leaves), dtype)
    tree.update(torch.arange(len(leaves)), torch.tensor(leaves, dtype=dtype))
    return tree


def first_reaching(leaves: list[int], mass: Tensor) -> list[int]:
    """By definition: the first slot whose prefix sum is not below the mass."""
    prefix = torch.tensor(leaves, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(prefix, mass.double(), right=False).tolist()


@both_trees
@both_dtypes
@given(leaves=whole_leaves)
@settings(max_examples=15, deadline=None)
def test_total_and_leaves_are_exact(make: Maker, dtype: torch.dtype, leaves: list[int]) -> None:
    tree = planted(make, leaves, dtype)
    assert tree.total() == sum(leaves)
    assert tree.leaves().tolist() == leaves
    assert tree[len(leaves) - 1] == leaves[-1]


@both_trees
@both_dtypes
@given(leaves=whole_leaves.filter(any))
@settings(max_examples=15, deadline=None)
def test_find_is_the_first_slot_that_reaches_the_mass(
    make: Maker, dtype: torch.dtype, leaves: list[int]
) -> None:
    tree = planted(make, leaves, dtype)
    mass = torch.arange(1, 2 * sum(leaves) + 1, dtype=dtype) / 2  # every half up to the total
    assert tree.find(mass).tolist() == first_reaching(leaves, mass)


@both_trees
@both_dtypes
@given(leaves=any_leaves, shares=st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_find_never_lands_on_a_zero_leaf(
    make: Maker, dtype: torch.dtype, leaves: list[float], shares: list[float]
) -> None:
    tree = planted(make, leaves, dtype)
    # Also the ends, what lies beyond them, and each prefix sum, where rounding decides.
    total, prefix = float(tree.total()), tree.leaves().cumsum(0)
    mass = torch.tensor([*(s * total for s in shares), 0.0, total, 2.0 * total], dtype=dtype)
    mass = torch.cat([mass, prefix, prefix.nextafter(prefix + 1)])
    assert (torch.as_tensor(tree[tree.find(mass)]) > 0).all()
    if isinstance(tree, CompiledSumTree):
        draw = (1.0 - mass.double() / total).clamp(0.0, 1.0 - 2**-53)
        _, leaf = tree.mix(draw.numpy(), len(leaves), 1.0, total)
        assert (leaf > 0).all()


@both_dtypes
@given(
    leaves=any_leaves,
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_sums_that_a_parallel_scan_has_rounded_up_and_down_find_no_zero_leaf(
    dtype: torch.dtype, leaves: list[float], shares: list[float], seed: int
) -> None:
    """What a GPU does, played on the CPU: each running sum off by some ulps, so that they fall."""
    rng = torch.Generator().manual_seed(seed)
    exact = Tensor.cumsum

    def parallel(rows: Tensor, dim: int) -> Tensor:
        noise = torch.randint(-4, 5, rows.shape, generator=rng) * torch.finfo(dtype).eps
        return exact(rows, dim) * (1.0 + noise.to(dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cumsum", parallel)
        tree = RadixSumTree(len(leaves), dtype)
        tree.device = torch.device("cuda")  # as which it guards against such sums
        every = torch.arange(len(leaves))
        tree.update(every, torch.tensor(leaves, dtype=dtype))
        for chunk in every.split(2):  # row by row as well
            tree.update(chunk, torch.tensor(leaves, dtype=dtype)[chunk])
        total, prefix = float(tree.total()), exact(tree[every], 0)
        mass = torch.tensor([*(s * total for s in shares), 0.0, total, 2.0 * total], dtype=dtype)
        mass = torch.cat([mass, prefix, prefix.nextafter(prefix + 1)])
        assert (tree[tree.find(mass)] > 0).all()


@both_trees
@both_dtypes
def test_duplicates_of_one_value_count_once(make: Maker, dtype: torch.dtype) -> None:
    tree = planted(make, [1.0] * 9, dtype)
    tree.update(torch.tensor([3, 5, 3, 3, 5]), torch.tensor([2, 4, 2, 2, 4], dtype=dtype))
    assert tree.leaves().tolist() == [1, 1, 1, 2, 1, 4, 1, 1, 1]
    assert tree.total() == 13


@both_trees
@given(
    updates=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=40),
        max_size=6,
    )
)
@settings(max_examples=15, deadline=None)
def test_sums_follow_any_history_of_updates(
    make: Maker, updates: list[list[tuple[int, int]]]
) -> None:
    tree, leaves = make(100, torch.float64), [0] * 100
    for update in updates:
        index, value = (torch.tensor(column) for column in zip(*update, strict=True))
        tree.update(index, value[last_of_duplicates(index, 100)].double())
        for i, v in update:
            leaves[i] = v
        assert tree.total() == sum(leaves)
    if any(leaves):
        mass = torch.arange(1, sum(leaves) + 1, dtype=torch.float64)
        assert tree.find(mass).tolist() == first_reaching(leaves, mass)


@both_trees
@pytest.mark.parametrize("capacity", [1, 2, 7, 8, 9, 1000, 1001])
def test_every_slot_of_every_capacity_can_be_set_and_found(make: Maker, capacity: int) -> None:
    tree = make(capacity, torch.float64)
    every = torch.arange(capacity)
    for chunk in every.split(3):  # few rows at a time, then below all at once
        tree.update(chunk, torch.ones(len(chunk), dtype=torch.float64))
    assert tree.total() == capacity
    assert torch.equal(tree.find(every + 1.0), every)
    tree.update(every, 2.0 * torch.ones(capacity, dtype=torch.float64))
    assert torch.equal(tree.find(2.0 * every + 1.0), every)


def test_a_compiled_tree_without_mass_raises_rather_than_looping() -> None:
    with pytest.raises(RuntimeError, match="total is 0"):
        CompiledSumTree(4).find(torch.tensor([0.5], dtype=torch.float64))


def test_last_of_duplicates_pairs_every_index_with_its_last_value() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 20, (100,), generator=generator)
    last = {int(i): at for at, i in enumerate(index)}
    assert last_of_duplicates(index, 20).tolist() == [last[int(i)] for i in index]


def test_without_the_extension_the_sampler_draws_from_the_torch_tree_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchrl._torchrl", None)  # its import now fails
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        samplers = [VLMPrioritizedSampler(8) for _ in range(3)]
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert "\n" not in messages[0]
    assert len(messages[0]) < 400
    assert "radix tree" in messages[0]
    assert all(isinstance(s._sum_tree, RadixSumTree) for s in samplers)


def test_cpu_gets_the_compiled_tree_and_other_devices_the_torch_tree() -> None:
    for device, kind in (("cpu", type(CompiledSumTree(4))), ("meta", RadixSumTree)):
        assert type(make_sum_tree(4, torch.float64, torch.device(device))) is kind
