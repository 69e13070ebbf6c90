"""What holds for every scorer that ``vlmrb_torchrl.scorers`` exports: a new file is found.

The clips have 8 frames of 64 by 64 pixels and three events, as `ClipScorer.example` promises.
"""

import inspect
import pickle

import pytest
import torch
from tensordict import TensorDict

import vlmrb_torchrl.scorers as scorers_package
from tests.contracts.examples import EXAMPLES
from vlmrb_torchrl.scorers import ClipScorer, PromptedScorer

SCORERS = [
    member
    for name in scorers_package.__all__
    if inspect.isclass(member := getattr(scorers_package, name))
    and issubclass(member, ClipScorer)
    and member.score is not ClipScorer.score
    and getattr(member, "score_prompts", None) is not PromptedScorer.score_prompts
]
B, F = 3, 8
CHANGES_NO_SCORE = {
    *("api_key_variable", "concurrency", "retries", "timeout_s"),
    *("attention", "batch_clips", "cache_megabytes", "compile", "dedup"),  # round, at most
    *("folder", "size_megabytes"),
    *("device", "revision"),  # in the revision, once loaded
}
"""Arguments that no ``config`` has to name."""


@pytest.fixture(scope="module", params=SCORERS, ids=lambda scorer: scorer.__name__)
def example(request):
    """Builds the class's example, again at each call."""
    build = EXAMPLES.get(request.param.__name__)
    return request.param.example if build is None else lambda: build(request)


@pytest.fixture(scope="module")
def scorer(example):
    return example()


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    return TensorDict(
        {
            "clip": torch.randint(0, 256, (B, F, 3, 64, 64), generator=generator).to(torch.uint8),
            "events": torch.rand(B, 3, generator=generator) < 0.5,
        },
        [B],
    )


def test_the_package_exports_scorers():
    assert len(SCORERS) >= 4


def test_one_score_in_the_unit_interval_per_clip(scorer, clips):
    score = scorer(clips)["score"]
    assert score.dtype == torch.float32
    assert score.shape == (B,)
    assert ((score >= 0) & (score <= 1)).all()
    assert not score.requires_grad


def test_keys_are_those_of_a_tensordict_module(scorer, clips):
    assert scorer.out_keys == ["score"]
    assert set(scorer.in_keys) <= {"clip", "events"}
    assert scorer.needs_frames == ("clip" in scorer.in_keys)
    assert scorer(clips.select(*scorer.in_keys))["score"].shape == (B,)


def test_a_missing_key_is_named_in_one_line_with_the_remedy(scorer, clips):
    for key in scorer.in_keys:
        with pytest.raises(KeyError) as error:
            scorer(clips.exclude(key))
        message = error.value.args[0]
        assert f"reads {key!r}" in message
        assert "ClipRenderTransform" in message or "environment" in message
        assert "\n" not in message


def test_a_clips_score_does_not_depend_on_its_batch(scorer, clips):
    if not scorer.deterministic:
        pytest.skip("a random scorer")
    together = scorer(clips.clone())["score"]
    for number in range(B):
        alone = scorer(clips[number : number + 1].clone())["score"]
        assert alone.item() == pytest.approx(together[number].item(), abs=1e-5)


def test_it_travels_to_another_process_and_answers_the_same(example, clips):
    """Before and after it has loaded its weights."""
    fresh = pickle.loads(pickle.dumps(example()))
    again = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(fresh(clips.clone())["score"], again(clips.clone())["score"])


def test_loading_twice_changes_nothing(scorer, clips):
    scorer.load()
    scorer.load()
    assert scorer(clips)["score"].shape == (B,)


def test_its_configuration_is_hashable_and_shown(scorer):
    assert isinstance(hash(scorer.config), int)
    assert isinstance(scorer.fingerprint, str)
    assert type(scorer).__name__ in repr(scorer)
    assert "\n" not in repr(scorer)


def test_every_argument_that_changes_scores_is_in_its_configuration(scorer):
    """Else a cache would take the scores of one value for those of another."""
    assert set(inspect.signature(type(scorer)).parameters) <= {
        *dict(scorer.config),
        *CHANGES_NO_SCORE,
    }


def test_its_device_is_a_torch_device(scorer):
    assert isinstance(scorer.device, torch.device)
    assert isinstance(scorer.cheap, bool)
