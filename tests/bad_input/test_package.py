"""The package refuses bad input in one line that names argument and value, and leaves no trace."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.data import Categorical, LazyTensorStorage
from torchrl.modules import QValueActor

import vlmrb_torchrl.envs as envs
import vlmrb_torchrl.objectives as objectives
import vlmrb_torchrl.renderers as renderers
import vlmrb_torchrl.samplers as samplers
import vlmrb_torchrl.scorers as scorers
from tests.bad_input.kinds import (
    COUNT,
    NO_DEVICE,
    NO_FLAG,
    NO_NAME,
    NO_NAMES,
    NO_NUMBER,
    NO_OBJECT,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SECONDS,
    SEED,
    SHARE,
    numbers,
    other_than,
    real,
    slots,
    tensors_but,
    whole,
)
from tests.scoring_doubles import Brightness, NumberRenderer, Yes
from tests.streams import stream
from vlmrb_torchrl import (
    AsyncScorer,
    ClipRenderTransform,
    ScoreBonus,
    VLMPrioritizedSampler,
    VLMReplayBuffer,
)

# What is no index is an IndexError and a missing key a KeyError, as everywhere in Python; lengths
# that do not match are a RuntimeError, as in TorchRL's own prioritized sampler.
REFUSALS = (ValueError, TypeError, LookupError, RuntimeError, FileNotFoundError)
SLOTS = 16
THREE = torch.arange(3)
PROMPTS = (*NO_NAMES, 0.5, None)

# ------------------------------------------------------------------------ constructors

SAMPLER = {
    **dict.fromkeys(("lmbda", "negative_priority", "unscored_priority"), SHARE),
    **dict.fromkeys(("alpha", "beta"), NOT_NEGATIVE),
    "threshold": real(0, 1, or_none=True),
    "td_boost": NO_FLAG,
}
LOCAL = {"device": NO_DEVICE, "batch_clips": COUNT, "cache_megabytes": POSITIVE, "dedup": NO_FLAG}
PRETRAINED = {
    **LOCAL,
    "prompts": PROMPTS,
    "frames": whole(1, or_none=True),
    "model": ("", " ", 3, 0.5, object(), "./no/such", "./no/model"),
    "dtype": (*NO_NAME, "int8", "float99", "Tensor", "torch.float32"),
    "revision": NO_NAME,
}
ENV = {
    "num_envs": whole(1, 65536),
    "max_steps": whole(1, or_none=True),
    "seed": SEED,
    "held_out": NO_FLAG,
    "device": NO_DEVICE,
}


def sampler() -> VLMPrioritizedSampler:
    made = VLMPrioritizedSampler(SLOTS, lmbda=0.5, threshold=None, td_boost=True)
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


def network() -> objectives.QuantileNetwork:
    return objectives.QuantileNetwork(nn.Linear(3, 4), nn.Linear(4, 2), num_features=4)


# By callable: arguments that it takes, and for each argument the values that it must refuse.
CONSTRUCTORS: dict[Callable[..., Any], tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    VLMPrioritizedSampler: (
        {"max_capacity": 8},
        {
            **SAMPLER,
            "max_capacity": whole(1, 10**15),  # more than any machine can address
            "eps": NOT_NEGATIVE,
            "reduction": other_than("max", "min", "median", "mean"),
            "dtype": (*NO_NAME, torch.float16, torch.int64),
            "device": NO_DEVICE,
            "max_priority_within_buffer": NO_FLAG,
        },
    ),
    ScoreBonus: (
        {"sampler": VLMPrioritizedSampler(8), "bonus": 0.5},
        {
            "sampler": (*NO_OBJECT, None),
            "bonus": (*NO_NUMBER, math.nan, math.inf, -math.inf, None),
            "threshold": real(0, 1, or_none=True),
            "reward_key": NO_NAME,
        },
    ),
    samplers.AttentiveSampler: (
        {},
        {"lmbda": real(1), "state_key": NO_NAME, "similarity": NO_OBJECT},
    ),
    samplers.OptimizedSampler: (
        {"max_capacity": 8},
        {
            **dict.fromkeys(("max_capacity", "policy_updates", "policy_batch_size"), COUNT),
            "hidden_features": ("x", 3, None, [0], [2.5], ["8"]),
            "learning_rate": POSITIVE,
            "unvisited_score": SHARE,
            "reward_key": NO_NAME,
        },
    ),
    samplers.GuidedPERSampler: (
        {"max_capacity": 8},
        {"rest_alpha": SHARE, "rest_eps": NOT_NEGATIVE},
    ),
    samplers.ReducibleLossSampler: (
        {"max_capacity": 8},
        {
            "mapping": other_than("relu", "exponential"),
            **dict.fromkeys(("alpha", "beta", "eps"), NOT_NEGATIVE),
        },
    ),
    VLMReplayBuffer: (
        {"storage": LazyTensorStorage(8), "batch_size": 2},
        {"priority_key": NO_NAME},
    ),
    ClipRenderTransform: (
        {"renderer": NumberRenderer()},
        {"renderer": NO_OBJECT, "in_keys": (*NO_NAMES, ["a", ""]), "out_keys": NO_NAMES},
    ),
    AsyncScorer: (
        {
            "buffer": buffer(),
            "transform": ClipRenderTransform(NumberRenderer()),
            "scorer": Yes(),
            "mode": "sync",
            "clip_transitions": 4,
        },
        {
            **dict.fromkeys(("buffer", "transform", "scorer"), NO_OBJECT),
            **dict.fromkeys(("frames_per_clip", "queue_clips", "batch_clips", "patience"), COUNT),
            **dict.fromkeys(("timeout_s", "start_timeout_s"), real(0, 1e9, above=True)),
            "worker_threads": COUNT,
            "clip_transitions": whole(1, SLOTS),
            "stride": whole(1, or_none=True),
            "max_wait_s": SECONDS,
            "duty_cycle": POSITIVE_SHARE,
            "mode": other_than("auto", "process", "thread", "sync"),
            "backoff_s": ("x", 3, None, (1.0,), (-1.0, 1.0), (2.0, 1.0), (1.0, math.nan)),
            "niceness": whole(0, 19),
            **dict.fromkeys(("seed", "delay_env_steps"), whole(0)),
            "dropped_share": SHARE,
        },
    ),
    scorers.ConstantScorer: ({}, {"value": SHARE}),
    scorers.RandomScorer: ({}, {"rate": SHARE, "seed": SEED}),
    scorers.NoisyScorer: (
        {"scorer": Yes()},
        {
            "scorer": NO_OBJECT,
            **dict.fromkeys(("true_positive_rate", "false_positive_rate"), SHARE),
            "seed": SEED,
        },
    ),
    scorers.PrivilegedScorer: (
        {"event_names": ("goal", "door")},
        {"event_names": ("", 3, [""], None), "events": (*PROMPTS, ["gaol"])},
    ),
    scorers.EmbeddedJudge: ({}, {**LOCAL, "questions": (*PROMPTS, "gaol", ["door", "gaol"])}),
    scorers.HuggingFaceScorer: (
        {"model": "org/model"},
        {
            **PRETRAINED,
            "attention": other_than("eager", "sdpa", or_none=True),
            "resolution": whole(1, or_none=True),
            "fps": POSITIVE,
            "answer_prefix": (3, None, "Answer: "),
            **dict.fromkeys(("compile", "trust_remote_code"), NO_FLAG),
        },
    ),
    scorers.ContrastiveScorer: (
        {"model": "org/model"},
        {
            **PRETRAINED,
            "baseline": NO_NAME,
            "pooling": other_than("max", "mean"),
            "scale": real(0, above=True, or_none=True),
        },
    ),
    scorers.EndpointScorer: (
        {"base_url": "http://localhost/v1", "model": "tiny"},
        {
            "base_url": (*NO_NAME, "localhost:80", "ftp://h/v1", "http://", "http://h:70000/v1"),
            "model": NO_NAME,
            "prompts": PROMPTS,
            "frames": whole(1, or_none=True),
            **dict.fromkeys(("concurrency", "max_tokens", "top_logprobs", "upscale"), COUNT),
            "timeout_s": real(0, 1e9, above=True),
            "retries": whole(0),
            "api_key_variable": (*NO_NAME, "sk-0123abc-!", "my key-!"),
            "image_format": other_than("png", "jpeg"),
            "media": other_than("images", "video"),
            "fps": POSITIVE,
            "extra_body": ("x", 3, {"f": print}),
        },
    ),
    scorers.CachedScorer: (
        {"scorer": Brightness()},
        {"scorer": NO_OBJECT, "folder": (3, 0.5, [1]), "size_megabytes": POSITIVE},
    ),
    renderers.MiniGridRenderer: (
        {},
        {
            "tile_size": whole(1, 1024),
            "window": whole(1, 1024, or_none=True),
            "sprites": (*NO_OBJECT, None),
        },
    ),
    renderers.SwappedSprites: ({}, {"swaps": ("x", 3, [1], {"gaol": "door"}, {"goal": "gaol"})}),
    renderers.AbstractSprites: ({}, {"seed": whole(0)}),
    renderers.MuJoCoRenderer: (
        {"stage": print},
        {
            "stage": NO_OBJECT,
            **dict.fromkeys(("width", "height"), whole(1, 8192)),
            "samples": whole(0, 8192),
            "camera": ("", 3, 0.5),
            "shadows": NO_FLAG,
        },
    ),
    envs.DoorKeyEnv: ({"num_envs": 1}, {**ENV, "size": whole(5, 256)}),
    envs.OGBenchEnv: (
        {"num_envs": 1},
        {**ENV, "env_id": ("", "scene", 3, None), "workers": whole(1, 1)},
    ),
    objectives.IQNLoss: (
        {"value_network": QValueActor(network(), spec=Categorical(2))},
        {
            "value_network": NO_OBJECT,
            **dict.fromkeys(("online_quantiles", "target_quantiles"), COUNT),
            "kappa": POSITIVE,
            "priority": other_than("mean", "pairwise"),
            **dict.fromkeys(("delay_value", "double_dqn"), ("no", 0.5, None)),
            "action_space": other_than("categorical", "one-hot", or_none=True),
            "reduction": other_than("mean", "sum", "none", or_none=True),
            "use_prioritized_weights": ("x", 1.5, None),
        },
    ),
    objectives.QuantileNetwork: (
        {"features": nn.Linear(3, 4), "head": nn.Linear(4, 2), "num_features": 4},
        {
            **dict.fromkeys(("features", "head", "distortion"), NO_OBJECT),
            **dict.fromkeys(("num_features", "num_cosines", "policy_quantiles"), whole(1, 1 << 20)),
            "in_key": NO_NAME,
        },
    ),
    objectives.quantile_huber: (
        {
            **dict.fromkeys(("prediction", "target"), torch.zeros(2, 3)),
            "tau": torch.full((2, 3), 0.5),
        },
        {
            "prediction": (torch.zeros(2, 3).long(),),
            **dict.fromkeys(("tau", "target"), (torch.zeros(2), torch.zeros(3, 3), THREE)),
            "kappa": POSITIVE,
        },
    ),
    objectives.cvar: (
        {"tau": torch.full((3,), 0.5), "risk_level": 0.5},
        {"tau": (*NO_OBJECT, THREE), "risk_level": POSITIVE_SHARE},
    ),
}

# ------------------------------------------------------------------------ methods


class Stored:
    """As much of a storage as a sampler reads."""

    ndim, device = 1, torch.device("cpu")

    def __len__(self) -> int:
        return SLOTS


class Scoring(AsyncScorer):
    """One with an open clip."""

    def __init__(self) -> None:
        transform = ClipRenderTransform(NumberRenderer())
        super().__init__(buffer(), transform, Yes(), mode="sync", clip_transitions=4)
        opened = stream([6], open_end=True, start=12)
        self.submit(opened, self._buffer.extend(opened))

    def state_dict(self) -> dict[str, Any]:
        return {"scoring": super().state_dict(), "buffer": self._buffer.state_dict()}


class Games(envs.DoorKeyEnv):
    """Three at their start."""

    def __init__(self) -> None:
        super().__init__(5, 3, seed=7)
        self.start = self.reset()

    def act(self, action: Any) -> None:
        self.step(self.start.clone().set("action", action))

    state_dict = envs.DoorKeyEnv.games_state_dict


def damaged_states() -> tuple[Any, ...]:
    """A sampler's states of which an entry is missing, or of another kind or shape, or NaN."""
    right, damaged = sampler().state_dict(), []
    for name, value in right.items():
        others = ["x", -3.0]
        if isinstance(value, torch.Tensor):
            others = [value.clone().fill_(math.nan), value[1:], value.to(torch.int64), None]
        damaged += [{**copy.deepcopy(right), name: other} for other in others]
        damaged.append({key: each for key, each in right.items() if key != name})
    return *damaged, *NO_OBJECT


def ask(scorer: scorers.ClipScorer, clips: Any) -> None:
    """Ask about clips that hold ``clips`` under the scorer's key."""
    tensor = isinstance(clips, torch.Tensor)
    scorer(TensorDict({scorer.in_keys[0]: clips}, [len(clips)]) if tensor else clips)


FRAMES, EVENTS = torch.zeros(2, 3, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.bool)
RENDERED = torch.zeros(1, 2, 2, 4, dtype=torch.uint8)
NO_STAMPS = (torch.zeros(3), torch.zeros(2, dtype=torch.int64), "x", {}, None)
NO_TRANSITIONS = (
    *NO_OBJECT,
    stream([3]).exclude(("next", "done")),
    stream([3]).exclude(("next", "render_state")),
    stream([]),
)
LATE, NEW = {"index": THREE, "generation": torch.zeros_like(THREE)}, stream([3], start=20)

# By method: what makes its owner, arguments that it takes, and the values that it must refuse.
METHODS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "VLMPrioritizedSampler.sample": (
        sampler,
        {"storage": Stored(), "batch_size": 4},
        {"batch_size": whole(0)},
    ),
    "VLMPrioritizedSampler.probabilities": (sampler, {"length": 4}, {"length": whole(1, SLOTS)}),
    "VLMPrioritizedSampler.statistics": (sampler, {"length": 4}, {"length": whole(0, SLOTS)}),
    "VLMPrioritizedSampler.update_score": (
        sampler,
        {"index": THREE, "score": 1.0},
        {"index": slots(SLOTS), "score": numbers(1)},
    ),
    "VLMPrioritizedSampler.update_priority": (
        sampler,
        {"index": THREE, "priority": 1.0},
        {"index": slots(SLOTS), "priority": numbers(math.inf)},
    ),
    "VLMPrioritizedSampler.mark_update": (sampler, {"index": THREE}, {"index": slots(SLOTS)}),
    "VLMPrioritizedSampler.load_state_dict": (
        sampler,
        {"state_dict": sampler().state_dict()},
        {"state_dict": damaged_states()},
    ),
    "VLMReplayBuffer.write_scores": (
        buffer,
        {**LATE, "score": torch.ones(3)},
        {"index": slots(SLOTS), "generation": NO_STAMPS, "score": numbers(1)},
    ),
    "VLMReplayBuffer.write_td_errors": (
        buffer,
        {**LATE, "td_error": torch.ones(3)},
        {"index": slots(SLOTS), "generation": NO_STAMPS, "td_error": numbers(math.inf)},
    ),
    "AsyncScorer.extend": (
        Scoring,
        {"data": NEW},
        {
            "data": NO_TRANSITIONS,
            "stored": ("x", 3, {}, stream([2]), stream([4])),
            "source": whole(0),
        },
    ),
    "AsyncScorer.submit": (
        Scoring,
        {"data": NEW, "index": THREE},
        {
            "data": (*NO_TRANSITIONS, stream([2]), stream([4])),
            "index": (*slots(SLOTS), torch.arange(2), torch.arange(4)),
            "source": whole(0),
        },
    ),
    "AsyncScorer.drain": (Scoring, {}, {"timeout_s": SECONDS}),
    "AsyncScorer.wait_until_ready": (Scoring, {}, {"timeout_s": real(0, 1e9, or_none=True)}),
    "EmbeddedJudge.asking": (
        scorers.EmbeddedJudge,
        {"prompts": "Is it done?"},
        {"prompts": PROMPTS},
    ),
    "DoorKeyEnv.act": (
        Games,
        {"action": THREE},
        {
            "action": (
                *(torch.tensor([0, 1, action]) for action in (-1, 7, 2**40)),
                *(torch.zeros(3), torch.zeros(3, dtype=torch.bool)),
            )
        },
    ),
    "DoorKeyEnv.set_seed": (Games, {"seed": 3}, {"seed": whole(0, or_none=True)}),
    "DoorKeyEnv.set_extra_state": (
        Games,
        {"state": {"seed": 3, "episodes": [1, 1, 1]}},
        {
            "state": tuple(
                {"seed": 3, "episodes": [1, 1, *more]} for more in ([], [-1], [0.5], ["x"])
            )
        },
    ),
}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "a scorer on frames": (
        partial(ask, Brightness()),
        {"clips": FRAMES},
        {"clips": (*NO_OBJECT, TensorDict({}, [2]), *tensors_but(torch.uint8, *FRAMES.shape))},
    ),
    "a scorer on events": (
        partial(ask, scorers.PrivilegedScorer(("goal", "door"))),
        {"clips": EVENTS},
        {"clips": (*NO_OBJECT, TensorDict({}, [2]), *tensors_but(torch.bool, *EVENTS.shape))},
    ),
    "a renderer": (
        renderers.MiniGridRenderer(4),
        {"render_state": RENDERED},
        {"render_state": (*NO_OBJECT, RENDERED.float(), RENDERED[..., :3], RENDERED + 11)},
    ),
}
# How a refusal names an argument, where it is not by the argument's own name: of the values alone
# the sampler speaks, of their number who counts the stamps, of clips the scorer's own key.
CALLED = {"state_dict": "sampler state", "index": "ind"}
CALLED |= dict.fromkeys(("clips", "generation", "score", "td_error", "state"), "")

# ------------------------------------------------------------------------ the tests


def frozen(value: Any) -> Any:
    """A copy that compares by content."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), tuple(value.shape), np.asarray(value).tobytes()
    if isinstance(value, TensorDictBase):
        value = dict(value.items(include_nested=True, leaves_only=True))
    if isinstance(value, dict):
        return {str(key): frozen(each) for key, each in value.items()}
    return [frozen(each) for each in value] if isinstance(value, (list, tuple)) else value


def check_refusal(call: Callable[..., Any], given: dict[str, Any], name: str, value: Any) -> None:
    """One line that names the argument and shows the value, unless that may be a key."""
    try:
        call(**given)
    except REFUSALS as error:
        text = str(error.args[0])
    else:
        raise AssertionError("was taken")
    assert len(text.splitlines()) == 1, f"more than a line: {text!r}"
    assert len(text) <= 600, f"{len(text)} characters: {text}"
    assert name in text, f"{name} is not named: {text}"
    rest = text.replace(name, "", 1)
    if name == "api_key_variable":
        assert not isinstance(value, str) or len(value) < 4 or value not in text, text
    elif not isinstance(value, (torch.Tensor, TensorDictBase, dict)):
        shown = (" ".join(form.split())[:60] for form in (str(value), repr(value)))
        assert any(form in rest for form in shown), f"not shown: {text}"
    assert sum(word.isalpha() for word in rest.split()) >= 2, f"no remedy: {text}"


def check_all(
    call: Callable[..., Any],
    good: dict[str, Any],
    bad: dict[str, tuple[Any, ...]],
    called: dict[str, str],
    state: Callable[[], Any] = lambda: None,
) -> None:
    threads, wrong = threading.active_count(), []
    for argument, values in bad.items():
        for value in values:
            before = frozen(state())
            try:
                name = called.get(argument, argument)
                check_refusal(call, {**good, argument: value}, name, value)
                assert frozen(state()) == before, "the refused call left a trace"
            except AssertionError as error:
                wrong.append(f"{argument}={value!r}: {error}")
    assert not wrong, "\n".join(wrong)
    assert threading.active_count() == threads
    if call is not envs.OGBenchEnv:  # whose simulator takes seconds
        call(**good)  # else a refusal might be of something else than the bad value


@pytest.mark.parametrize("call", CONSTRUCTORS, ids=lambda call: call.__name__)
def test_a_bad_argument_of_a_constructor_is_refused(call: Callable[..., Any]) -> None:
    check_all(call, *CONSTRUCTORS[call], called={})


@pytest.mark.parametrize("name", METHODS)
def test_a_bad_argument_of_a_method_is_refused_and_leaves_no_trace(name: str) -> None:
    make, good, bad = METHODS[name]
    owner = make()
    state = owner.state_dict if hasattr(owner, "state_dict") else lambda: None
    check_all(getattr(owner, name.split(".")[1]), good, bad, CALLED, state)


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_drawn_or_judged_is_refused(name: str) -> None:
    check_all(*CALLS[name], called=CALLED)


@pytest.mark.parametrize("name", SAMPLER)
def test_a_bad_setting_of_a_sampler_is_refused_later_too(name: str) -> None:
    made = sampler()
    put = lambda **value: setattr(made, name, value[name])  # noqa: E731
    check_all(put, {name: getattr(made, name)}, {name: SAMPLER[name]}, {}, made.state_dict)


def test_what_is_no_minigrid_has_no_render_state() -> None:
    for value in NO_OBJECT:
        given = {"env": value}
        check_refusal(renderers.minigrid_render_state, given, "env", value)
