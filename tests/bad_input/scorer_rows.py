"""What scorers must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict

from tests.bad_input import values
from tests.bad_input.case import Case
from tests.bad_input.replay_rows import LOOKUP
from tests.scorers.cached_doubles import Brightness
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.scorers import (
    CachedScorer,
    ConstantScorer,
    ContrastiveScorer,
    EmbeddedJudge,
    EndpointScorer,
    HuggingFaceScorer,
    NoisyScorer,
    PrivilegedScorer,
    RandomScorer,
)
from vlmrb_torchrl.scorers.embedded import FOLDER

MOST_SEED = 2**63 - 1
PROMPTS = st.one_of(values.NO_NAMES, st.floats(), st.none())
KEY = st.text(alphabet="abckeysk-_ 0123", min_size=1, max_size=20).map(lambda text: text + "-!")
LOCAL = {
    "prompts": PROMPTS,
    "device": values.device(),
    "frames": values.whole(1, or_none=True),
    "batch_clips": values.whole(1),
    "cache_megabytes": values.real(0, above=True),
    "dedup": values.flag(or_none=True),
}
PRETRAINED = {
    **LOCAL,
    "model": st.one_of(
        values.NO_NAME.filter(lambda v: not isinstance(v, list)),
        st.text("./ab", min_size=2, max_size=9).map(lambda name: "./no/" + name),
    ),
    "dtype": st.one_of(
        values.NO_NAME, st.sampled_from(["int8", "float99", "Tensor", "torch.float32"])
    ),
    "revision": values.NO_NAME,
}


def simply(call: Callable[..., Any], bad: dict[str, Any], **more: Any) -> Callable[[], Case]:
    """A row of a class whose arguments have defaults, or stand in ``good``."""
    good = more.pop("good", {})
    return lambda: Case(call.__name__, call, good.copy, bad, **more)


def of_clips(scorer: Any, key: str, bad: Any, good: torch.Tensor) -> Callable[[], Case]:
    """A row of what a scorer is asked about."""

    def ask(clips: Any) -> None:
        if isinstance(clips, torch.Tensor) and clips.ndim:
            clips = TensorDict({key: clips}, [len(clips)])
        scorer(clips)

    some = bad.filter(lambda each: not each.ndim or len(each))  # a batch of none is one, too

    def row() -> Case:
        return Case(
            f"{type(scorer).__name__}()",
            ask,
            lambda: {"clips": good},
            {"clips": st.one_of(values.NO_OBJECT, some, st.just(TensorDict({}, [2])))},
            scorer.state_dict,
            called={"clips": ""},
            kinds=LOOKUP,
        )

    return row


CLIPS = torch.zeros(2, 3, 3, 2, 2, dtype=torch.uint8)
ROWS: dict[str, Callable[[], Case]] = {
    "ConstantScorer": simply(ConstantScorer, {"value": values.real(0, 1)}),
    "RandomScorer": simply(
        RandomScorer, {"rate": values.real(0, 1), "seed": values.whole(0, MOST_SEED)}
    ),
    "NoisyScorer": simply(
        NoisyScorer,
        {
            "scorer": values.NO_OBJECT,
            "true_positive_rate": values.real(0, 1),
            "false_positive_rate": values.real(0, 1),
            "seed": values.whole(0, MOST_SEED),
        },
        good={"scorer": ConstantScorer()},
    ),
    "PrivilegedScorer": simply(
        PrivilegedScorer,
        {"event_names": PROMPTS, "events": st.one_of(PROMPTS, st.just(["gaol"]))},
        good={"event_names": ("goal", "door")},
    ),
    "EmbeddedJudge": simply(
        EmbeddedJudge,
        {
            **{name: bad for name, bad in LOCAL.items() if name not in ("prompts", "frames")},
            "questions": st.one_of(
                PROMPTS, st.text(max_size=5).filter(lambda question: question not in MINIGRID)
            ),
        },
    ),
    "EmbeddedJudge.asking": lambda: Case(
        "asking",
        EmbeddedJudge().asking,
        lambda: {"prompts": "Is it done?"},
        {"prompts": PROMPTS},
    ),
    "HuggingFaceScorer": simply(
        HuggingFaceScorer,
        {
            **PRETRAINED,
            "attention": values.other_than(
                "eager", "sdpa", "flash_attention_2", "flex_attention", or_none=True
            ),
            "resolution": values.whole(1, or_none=True),
            "fps": values.real(0, above=True),
            "answer_prefix": st.one_of(
                st.integers(), st.none(), st.text(max_size=9).map(lambda text: text + " ")
            ),
            "compile": values.flag(),
            "trust_remote_code": values.flag(),
        },
        good={"model": str(FOLDER)},
        kinds=(ValueError, TypeError, FileNotFoundError),
    ),
    "ContrastiveScorer": simply(
        ContrastiveScorer,
        {
            **PRETRAINED,
            "baseline": values.NO_NAME,
            "pooling": values.other_than("max", "mean"),
            "scale": values.real(0, above=True, or_none=True),
        },
        good={"model": str(FOLDER)},
        kinds=(ValueError, TypeError, FileNotFoundError),
    ),
    "EndpointScorer": simply(
        EndpointScorer,
        {
            "base_url": st.one_of(
                values.NO_NAME,
                st.sampled_from(["localhost:8000", "ftp://host/v1", "http://", "http://[/v1"]),
                st.integers(65536, 10**9).map(lambda port: f"http://host:{port}/v1"),
                st.text(max_size=12),
            ).filter(lambda url: not (isinstance(url, str) and set(url) & set("@?#"))),
            "model": values.NO_NAME,
            "prompts": PROMPTS,
            "frames": values.whole(1, or_none=True),
            "concurrency": values.whole(1),
            "timeout_s": values.real(0, 1e9, above=True),
            "retries": values.whole(0),
            "api_key_variable": st.one_of(values.NO_NAME, KEY),
            "max_tokens": values.whole(1),
            "top_logprobs": values.whole(1),
            "image_format": values.other_than("png", "jpeg"),
            "upscale": values.whole(1),
            "media": values.other_than("images", "video"),
            "fps": values.real(0, above=True),
            "extra_body": st.one_of(
                st.text(min_size=1, max_size=4), st.integers(1), st.just({"f": print})
            ),
        },
        good={"base_url": "http://localhost/v1", "model": "tiny"},
        secret=frozenset({"api_key_variable"}),
    ),
    "CachedScorer": simply(
        CachedScorer,
        {
            "scorer": values.NO_OBJECT,
            "folder": st.one_of(st.integers(), st.floats(), st.lists(st.integers())),
            "size_megabytes": values.real(0, above=True),
        },
        good={"scorer": Brightness()},
    ),
    "ClipScorer() on clips": of_clips(
        Brightness(), "clip", values.tensors_but(torch.uint8, None, None, 3, None, None), CLIPS
    ),
    "ClipScorer() on events": of_clips(
        PrivilegedScorer(("goal", "door")),
        "events",
        values.tensors_but(torch.bool, None, 2),
        torch.zeros(2, 2, dtype=torch.bool),
    ),
}
