"""Saving, restoring, reporting and checking a sampler."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from tests.samplers.sampler_facts import (
    EVERY,
    SEED,
    SLOTS,
    Slots,
    facts,
    on,
    snapshot,
    told,
    written,
)
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.samplers.trees import CompiledSumTree, RadixSumTree

pytestmark = pytest.mark.usefixtures("place")


def used(**arguments: Any) -> VLMPrioritizedSampler:
    sampler = VLMPrioritizedSampler(SLOTS + 5, lmbda=0.5, beta=0.4, **arguments)
    return told(sampler, *facts(SEED))


def unused(**arguments: Any) -> VLMPrioritizedSampler:
    return VLMPrioritizedSampler(SLOTS + 5, **arguments)


@pytest.mark.parametrize("make", [used, unused])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("trees", product([CompiledSumTree, RadixSumTree], repeat=2))
def test_a_restored_sampler_is_bit_equal_and_draws_the_same(
    make: Callable[..., VLMPrioritizedSampler],
    dtype: torch.dtype,
    trees: tuple[type, type],
    tmp_path: Any,
) -> None:
    source = on(trees[0], make(td_boost=True, dtype=dtype))
    source.dumps(tmp_path / "new" / "folder")
    for load in (
        lambda target: target.load_state_dict(source.state_dict()),
        lambda target: target.loads(tmp_path / "new" / "folder"),
    ):
        target = on(trees[1], VLMPrioritizedSampler(SLOTS + 5, td_boost=True, dtype=dtype))
        target.extend(torch.arange(3))  # a past that the state replaces
        load(target)
        assert snapshot(target) == snapshot(source)
        target.check_valid()
        assert (written(target), target._positive) == (written(source), source._positive)
        if make is used:
            draws = []
            for sampler in (source, target):
                sampler._rng = torch.Generator().manual_seed(SEED)
                draws.append(sampler.sample(Slots(SLOTS), 256))
            assert torch.equal(draws[0][0], draws[1][0])
            q, q_loaded = (info["sampling_probability"] for _, info in draws)
            torch.testing.assert_close(q, q_loaded, rtol=1e-6, atol=0.0)
    source.extend(torch.arange(SLOTS))  # the copy has a life of its own
    assert written(target) == (SLOTS if make is used else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # of another make
        ({"max_size": 7}, "max_size is 7"),
        ({"dtype": torch.float32}, "float32"),
        ({"td_boost": False}, "td_boost is False"),
        ({"threshold": None}, "threshold is None"),
        ({"_eps": 0.5}, "eps is 0.5"),
        ({"negative_priority": 1.0}, "negative_priority is 1.0"),
        ({"unscored_priority": 1.0}, "unscored_priority is 1.0"),
        # damaged
        ({"_max_priority": ("x", math.nan)}, "_max_priority"),
        ({"_max_priority": (1e9, SLOTS + 5)}, "_max_priority"),
        ({"_max_priority": (None, None)}, "above the running maximum"),
        ({"lmbda": 1.5}, "lmbda is 1.5"),
        ({"_score": {0: math.nan}}, "score outside"),
        ({"_score": {SLOTS: 0.5}}, "score of a slot never written"),
        ({"_td_error": {0: math.inf}}, "not finite"),
        ({"_sum_tree": {0: 9.0}}, "a leaf off"),
        ({"_sum_tree": {SLOTS: 0.1}}, "a leaf off"),
    ],
)
def test_a_state_that_cannot_be_is_refused_in_one_line_and_changes_nothing(
    change: dict[str, Any], message: str
) -> None:
    target, state = used(td_boost=True), used(td_boost=True).state_dict()
    before = snapshot(target)
    for name, value in change.items():
        if isinstance(value, dict):
            for slot, number in value.items():
                state[name][slot] = number
        else:
            state[name] = value
    with pytest.raises(ValueError, match=message) as refusal:
        target.load_state_dict(state)
    assert "\n" not in str(refusal.value)
    assert snapshot(target) == before
    target.check_valid()


def test_what_follows_from_scores_and_settings_is_not_saved() -> None:
    assert not {"_p", "_rows", "_positive"} & set(used().state_dict())
    target = unused()
    target.load_state_dict(used().state_dict())
    assert torch.equal(target._p[:SLOTS], used()._p[:SLOTS])
    assert target.statistics(SLOTS)["share_positive"] > 0


def test_a_sampler_can_be_copied_and_pickled_and_the_copy_is_its_own() -> None:
    sampler = used(td_boost=True)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert snapshot(twin) == snapshot(sampler)
        twin.extend(EVERY)
        twin.check_valid()
    assert sampler.scored.any()


def test_statistics_in_closed_form() -> None:
    """8 slots, 4 scored, 2 positive, λ = 0.5, ε = 0: q is 1/16 + 1/4 twice and 1/16 six times."""
    sampler = VLMPrioritizedSampler(16, lmbda=0.5, eps=0.0)
    assert sampler.statistics(0)["effective_sample_size"] == 0.0
    sampler.extend(torch.arange(8))
    assert sampler.statistics(8)["effective_sample_size"] == pytest.approx(1.0)
    sampler.update_score(torch.arange(4), torch.tensor([1.0, 0.9, 0.1, 0.0]))
    squares = 2 * (1 / 16 + 1 / 4) ** 2 + 6 * (1 / 16) ** 2
    assert sampler.statistics(8) == pytest.approx(
        {
            "share_scored": 0.5,
            "share_positive": 0.25,
            "effective_sample_size": 1 / squares / 8,
        }
    )


def test_check_valid_names_what_is_off(place: str) -> None:
    breaks: dict[str, Callable[[VLMPrioritizedSampler], Any]] = {
        "a score outside": lambda s: s._score.__setitem__(0, 1.5),
        "not finite": lambda s: s._td_error.__setitem__(0, torch.nan),
        "of a slot without it": lambda s: s.__dict__.update(
            _max_priority=(9.0, 0), _max_priority_within_buffer=True
        ),
        "_p is": lambda s: s._p.__setitem__(1, 0.3),
        "_rows is 3": lambda s: setattr(s, "_rows", 3),
        "_positive is 3": lambda s: setattr(s, "_positive", 3),
        "a leaf off": lambda s: s._sum_tree.update(
            torch.tensor([2]), torch.tensor([9.0], dtype=s.dtype)
        ),
        "above the running maximum": lambda s: setattr(s, "_max_priority", (0.0, 0)),
        "never written": lambda s: s._score.__setitem__(SLOTS + 1, 0.5),
    }
    if place == "as on a GPU":  # where the slot of the maximum is not kept
        del breaks["of a slot without it"]
    for message, damage in breaks.items():
        sampler = used(td_boost=True)
        damage(sampler)
        with pytest.raises(ValueError, match=message):
            sampler.check_valid()


def test_repr_names_the_method_and_its_tree() -> None:
    sampler = VLMPrioritizedSampler(8)
    assert repr(sampler) == (
        "VLMPrioritizedSampler(8, lmbda=0.5, alpha=0.6, beta=0.0, td_boost=False, threshold=0.5, "
        f"negative_priority=0.0, unscored_priority=0.0, tree={type(sampler._sum_tree).__name__})"
    )
