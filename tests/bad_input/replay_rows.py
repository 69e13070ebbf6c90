"""What the sampler, the buffer and the scorer beside it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torchrl.data import LazyTensorStorage

from tests.bad_input import values
from tests.bad_input.case import Case
from tests.scoring_doubles import NumberRenderer, Yes
from tests.streams import stream
from vlmrb_torchrl import (
    AsyncScorer,
    ClipRenderTransform,
    VLMPrioritizedSampler,
    VLMReplayBuffer,
)

SLOTS = 16
LOOKUP = (ValueError, TypeError, LookupError)
"""An index that is none is an IndexError, a missing key a KeyError, as everywhere in Python."""
TORCHRL = (*LOOKUP, RuntimeError)
"""TorchRL's own prioritized sampler raises RuntimeError where values and indices do not match."""


def sampler(**arguments: Any) -> VLMPrioritizedSampler:
    made = VLMPrioritizedSampler(SLOTS, **{"lmbda": 0.5, "threshold": None, **arguments})
    made.extend(torch.arange(SLOTS))
    made.update_score(torch.arange(9), 0.25)
    made.update_priority(torch.arange(4, 12), 0.75)
    return made


def buffer() -> VLMReplayBuffer:
    made = VLMReplayBuffer(
        storage=LazyTensorStorage(SLOTS), sampler=VLMPrioritizedSampler(SLOTS), batch_size=4
    )
    made.extend(stream([12]))
    return made


def new_sampler() -> Case:
    return Case(
        "VLMPrioritizedSampler",
        VLMPrioritizedSampler,
        lambda: {"max_capacity": 8},
        {
            "max_capacity": values.whole(1, 10**15),  # more than any machine can address
            "lmbda": values.real(0, 1),
            "alpha": values.real(0),
            "beta": values.real(0),
            "eps": values.real(0),
            "threshold": values.real(0, 1, or_none=True),
            "unscored_priority": values.real(0, 1),
            "reduction": values.other_than("max", "min", "median", "mean"),
            "dtype": st.one_of(values.NO_NAME, st.sampled_from([torch.float16, torch.int64])),
            "device": values.device(or_none=True),
            "td_boost": values.flag(),
            "max_priority_within_buffer": values.flag(),
        },
    )


def sampler_properties() -> Case:
    made = sampler()

    def put(**value: Any) -> None:
        for name, each in value.items():
            setattr(made, name, each)

    bad = {
        "lmbda": values.real(0, 1),
        "alpha": values.real(0),
        "beta": values.real(0),
        "td_boost": values.flag(),
        "threshold": values.real(0, 1, or_none=True),
        "unscored_priority": values.real(0, 1),
    }
    return Case("setting a property", put, dict, bad, made.state_dict)


def of_sampler(
    method: str, good: dict[str, Any], bad: dict[str, Any], **more: Any
) -> Callable[[], Case]:
    def row() -> Case:
        made = sampler(td_boost=True)
        return Case(method, getattr(made, method), good.copy, bad, made.state_dict, **more)

    return row


class Stored:
    """As much of a storage as a sampler reads."""

    ndim, device = 1, torch.device("cpu")

    def __len__(self) -> int:
        return SLOTS


THREE = torch.arange(3)
STATE = sampler(td_boost=True).state_dict()


@st.composite
def damaged_states(draw: Any) -> Any:
    """A sampler's state of which one entry is missing or another, or one slot impossible."""
    state = copy.deepcopy(STATE)
    name = draw(st.sampled_from(sorted(state)))
    if draw(st.booleans()):
        del state[name]
    elif isinstance(state[name], torch.Tensor):
        if draw(st.booleans()):
            state[name] = draw(values.tensors_but(torch.float64, SLOTS))
        else:  # all slots are written, and |δ| is at most 0.75
            state[name][draw(st.integers(0, SLOTS - 1))] = draw(
                st.sampled_from([torch.nan, torch.inf, -torch.inf, 1.5])
            )
    elif name == "_max_priority":
        state[name] = draw(
            st.one_of(
                st.tuples(values.real(0.75), st.just(0)),
                st.tuples(st.just(1.0), values.whole(0, SLOTS - 1)),
                st.sampled_from([None, (), (1.0,), (None, None), (None, 0)]),
            )
        )
    else:
        state[name] = draw(st.one_of(st.text(max_size=5), st.floats(max_value=-1e-9), st.just(-3)))
    return state


def new_buffer() -> Case:
    def build(**arguments: Any) -> VLMReplayBuffer:
        return VLMReplayBuffer(storage=LazyTensorStorage(8), batch_size=2, **arguments)

    return Case("VLMReplayBuffer", build, dict, {"priority_key": values.NO_NAME})


def loaded_buffer() -> Case:
    made = buffer()
    return Case(
        "load_state_dict",
        made.load_state_dict,
        lambda: {"state_dict": buffer().state_dict()},
        {
            "state_dict": st.one_of(values.NO_OBJECT, damaged_states()).map(
                lambda sampler: {**buffer().state_dict(), "_sampler": sampler}
            )
        },
        made.state_dict,
        called={"state_dict": "sampler state"},
    )


def late_writes(method: str, bad_values: Any) -> Callable[[], Case]:
    name = {"write_scores": "score", "write_td_errors": "td_error"}[method]

    def row() -> Case:
        made = buffer()
        return Case(
            method,
            getattr(made, method),
            lambda: {"index": THREE, "generation": torch.zeros_like(THREE), name: torch.ones(3)},
            {
                "index": values.slots(3, SLOTS),
                "generation": st.one_of(
                    values.tensors_but(torch.int64, 3).filter(lambda t: t.dtype != torch.uint8),
                    values.NO_TENSOR,
                ),
                name: bad_values,
            },
            made.state_dict,
            # Of the values alone the sampler speaks; of their number, who counts the stamps.
            called={name: "", "index": "ind", "generation": ""},
            kinds=LOOKUP,
        )

    return row


def transform() -> Case:
    keys = st.one_of(values.NO_NAMES, st.just(["a", ""]))
    return Case(
        "ClipRenderTransform",
        ClipRenderTransform,
        lambda: {"renderer": NumberRenderer()},
        {"renderer": values.NO_OBJECT, "in_keys": keys, "out_keys": keys},
    )


def new_scoring() -> Case:
    made = buffer()

    def build(**arguments: Any) -> None:
        AsyncScorer(**arguments).close()

    return Case(
        "AsyncScorer",
        build,
        lambda: {
            "buffer": made,
            "transform": ClipRenderTransform(NumberRenderer()),
            "scorer": Yes(),
            "mode": "sync",
            "clip_transitions": 4,
        },
        {
            "buffer": values.NO_OBJECT,
            "transform": values.NO_OBJECT,
            "scorer": values.NO_OBJECT,
            "clip_transitions": values.whole(1, SLOTS),
            "frames_per_clip": values.whole(1),
            "stride": values.whole(1, or_none=True),
            "queue_clips": values.whole(1),
            "batch_clips": values.whole(1),
            "max_wait_s": values.real(0, 1e9),
            "duty_cycle": values.real(0, 1, above=True),
            "mode": values.other_than("auto", "process", "thread", "sync"),
            "timeout_s": values.real(0, 1e9, above=True),
            "start_timeout_s": values.real(0, 1e9, above=True),
            "backoff_s": st.one_of(
                values.NO_OBJECT.filter(lambda v: not isinstance(v, list)),
                st.tuples(values.real(0, 1e9), st.just(1.0)),
                st.tuples(st.just(1.0), values.real(1, 1e9)),
            ),
            "niceness": values.whole(0, 19),
            "worker_threads": values.whole(1),
            "patience": values.whole(1),
            "seed": values.whole(0),
        },
        made.state_dict,
    )


def of_scoring(
    method: str, good: Callable[[], dict[str, Any]], bad: dict[str, Any]
) -> Callable[[], Case]:
    def row() -> Case:
        made = buffer()
        scoring = AsyncScorer(
            made,
            ClipRenderTransform(NumberRenderer()),
            Yes(),
            mode="sync",
            clip_transitions=4,
            frames_per_clip=2,
        )
        opened = stream([6], open_end=True, start=12)
        scoring.submit(opened, made.extend(opened))

        def state() -> Any:
            return scoring.state_dict(), made.sampler.state_dict(), made.write_count

        return Case(method, getattr(scoring, method), good, bad, state, kinds=LOOKUP)

    return row


def inserted() -> dict[str, Any]:
    return {"data": stream([3], start=20), "index": THREE}


NO_TRANSITIONS = st.one_of(
    values.NO_OBJECT,
    st.sampled_from([("next", "done"), ("next", "render_state")]).map(
        lambda key: stream([3]).exclude(key)
    ),
    st.just(stream([])),
)

SUBMITTED = {
    "data": st.one_of(
        NO_TRANSITIONS,
        st.integers(1, 40).filter(lambda T: T != 3).map(lambda T: stream([T])),
    ),
    # Three whole numbers are taken in any shape: data is [N, T] where the slots of it are [N T].
    "index": st.one_of(
        values.slots(3, SLOTS),
        values.tensors_but(torch.int64, 3).filter(
            lambda index: not (index.dtype in (torch.uint8, torch.int64) and index.numel() == 3)
        ),
    ),
    "source": values.whole(0),
}

EXTENDED = {
    "data": NO_TRANSITIONS,
    "stored": st.one_of(
        values.NO_OBJECT.filter(lambda value: value is not None),
        st.integers(1, 40).filter(lambda T: T != 3).map(lambda T: stream([T])),
    ),
    "source": values.whole(0),
}

ROWS: dict[str, Callable[[], Case]] = {
    "VLMPrioritizedSampler": new_sampler,
    "VLMPrioritizedSampler's properties": sampler_properties,
    "VLMPrioritizedSampler.sample": of_sampler(
        "sample", {"storage": Stored(), "batch_size": 4}, {"batch_size": values.whole(0)}
    ),
    "VLMPrioritizedSampler.probabilities": of_sampler(
        "probabilities", {"length": 4}, {"length": values.whole(1, SLOTS)}
    ),
    "VLMPrioritizedSampler.statistics": of_sampler(
        "statistics", {"length": 4}, {"length": values.whole(0, SLOTS)}
    ),
    "VLMPrioritizedSampler.update_score": of_sampler(
        "update_score",
        {"index": THREE, "score": torch.ones(3)},
        {"index": values.slots(3, SLOTS), "score": values.unit_values(3)},
        kinds=TORCHRL,
    ),
    "VLMPrioritizedSampler.update_priority": of_sampler(
        "update_priority",
        {"index": THREE, "priority": torch.ones(3)},
        {"index": values.slots(3, SLOTS), "priority": values.sizes(3)},
        kinds=TORCHRL,
    ),
    "VLMPrioritizedSampler.mark_update": of_sampler(
        "mark_update", {"index": THREE}, {"index": values.slots(3, SLOTS)}, kinds=LOOKUP
    ),
    "VLMPrioritizedSampler.load_state_dict": of_sampler(
        "load_state_dict",
        {"state_dict": STATE},
        {"state_dict": st.one_of(values.NO_OBJECT, damaged_states())},
        called={"state_dict": "sampler state"},
    ),
    "VLMReplayBuffer": new_buffer,
    "VLMReplayBuffer.load_state_dict": loaded_buffer,
    "VLMReplayBuffer.write_scores": late_writes("write_scores", values.unit_values(3)),
    "VLMReplayBuffer.write_td_errors": late_writes("write_td_errors", values.sizes(3)),
    "ClipRenderTransform": transform,
    "AsyncScorer": new_scoring,
    "AsyncScorer.extend": of_scoring("extend", lambda: {"data": stream([3], start=20)}, EXTENDED),
    "AsyncScorer.submit": of_scoring("submit", inserted, SUBMITTED),
    "AsyncScorer.drain": of_scoring("drain", dict, {"timeout_s": values.real(0, 1e9)}),
    "AsyncScorer.wait_until_ready": of_scoring(
        "wait_until_ready", dict, {"timeout_s": values.real(0, 1e9, or_none=True)}
    ),
}
