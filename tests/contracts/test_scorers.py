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


@pytest.fixture(scope="module", params=SCORERS, ids=lambda scorer: scorer.__name__)
def scorer(request):
    """The class's example."""
    build = EXAMPLES.get(request.param.__name__)
    example = request.param.example() if build is None else build(request)
    return pickle.loads(pickle.dumps(example))  # before it has loaded its weights, too


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


def test_it_travels_to_another_process_and_answers_the_same(scorer, clips):
    """Also after it has loaded its weights, which stay behind."""
    scorer.load()
    scorer.load()  # changes nothing
    copy = pickle.loads(pickle.dumps(scorer))
    assert torch.equal(copy(clips.clone())["score"], scorer(clips.clone())["score"])


def test_every_argument_that_changes_scores_is_in_its_configuration_and_shown(scorer):
    """Else a cache would take the scores of one value for those of another."""
    known = dict(scorer.config)
    assert (
        known.keys() | scorer.changes_no_score >= inspect.signature(type(scorer)).parameters.keys()
    )
    assert ... not in known.values()
    assert isinstance(scorer.fingerprint, str)
    assert type(scorer).__name__ in repr(scorer)
    assert "\n" not in repr(scorer)


def test_its_device_is_a_torch_device(scorer):
    assert isinstance(scorer.device, torch.device)
    assert isinstance(scorer.cheap, bool)
