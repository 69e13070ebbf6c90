"""Examples of scorers whose arguments have no defaults: events, a model's folder, a server.

The contract tests take ``EXAMPLES[class name](request)`` in place of the class's ``example()``.
``request`` is a module's pytest request: its ``addfinalizer`` stops what was started,
``getfixturevalue("tmp_path_factory")`` has folders.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.scorers import contrastive_models
from tests.scorers.endpoint_server import MODEL, EndpointServer
from vlmrb_torchrl.scorers import (
    CachedScorer,
    ClipScorer,
    ContrastiveScorer,
    EmbeddedJudge,
    EndpointScorer,
    HuggingFaceScorer,
    NoisyScorer,
    PrivilegedScorer,
)
from vlmrb_torchrl.scorers.embedded import FOLDER

EVENTS = ("goal", "door", "key")


def _cached(request: pytest.FixtureRequest) -> CachedScorer:
    folder = request.getfixturevalue("tmp_path_factory").mktemp("scores")
    return CachedScorer(EmbeddedJudge(), folder)


def _contrastive(request: pytest.FixtureRequest) -> ContrastiveScorer:
    folder = request.getfixturevalue("tmp_path_factory").mktemp("clip")
    return ContrastiveScorer(contrastive_models.clip(folder))


def _endpoint(request: pytest.FixtureRequest) -> EndpointScorer:
    server = EndpointServer()
    request.addfinalizer(server.close)
    return EndpointScorer(server.url, MODEL)


EXAMPLES: dict[str, Callable[[pytest.FixtureRequest], ClipScorer]] = {
    "CachedScorer": _cached,
    "ContrastiveScorer": _contrastive,
    "EndpointScorer": _endpoint,
    "HuggingFaceScorer": lambda _: HuggingFaceScorer(FOLDER, answer_prefix=""),
    "NoisyScorer": lambda _: NoisyScorer(PrivilegedScorer(EVENTS)),
    "PrivilegedScorer": lambda _: PrivilegedScorer(EVENTS),
}
