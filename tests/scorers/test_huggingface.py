"""The scoring path, on tiny PerceptionLMs with random weights: no judgement, only arithmetic."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from recipes.train_judge.model import build_model, build_processor, build_tokenizer
from vlmrb_torchrl.scorers import HuggingFaceScorer
from vlmrb_torchrl.scorers.pretrained import answer_ids, answer_start

ASK = "Does this clip contain a clear instance of goal satisfaction?"
OTHER = "Is a door opened in this clip? Answer Yes or No."


def tiny(path: Path, tokens_per_side: int) -> Path:
    torch.manual_seed(0)
    processor = build_processor(tokens_per_side=tokens_per_side)
    model = build_model(processor, vision_width=32, vision_layers=1, width=32, layers=1)
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("one"), tokens_per_side=1)


@pytest.fixture(scope="module")
def four_tokens_a_frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("four"), tokens_per_side=2)


def some_clips(count: int = 5, frames: int = 6) -> TensorDict:
    """Clips whose frames repeat, within a clip and across clips."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return TensorDict(
        {"clip": pool[torch.randint(0, 7, (count, frames), generator=generator)]}, [count]
    )


def scores(scorer: HuggingFaceScorer, clips: TensorDict) -> torch.Tensor:
    return scorer(clips.clone())["score"]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["folder", "four_tokens_a_frame"])
def test_reused_frame_embeddings_change_no_score(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    plain = HuggingFaceScorer(path, ASK, dedup=False)
    reused = HuggingFaceScorer(path, ASK)
    clips = some_clips()
    close(scores(reused, clips), scores(plain, clips))
    close(scores(reused, clips), scores(plain, clips))  # now every frame comes from the cache
    assert plain._loaded is not None
    assert plain._loaded.embeddings is None
    assert reused._loaded is not None
    assert reused._loaded.embeddings is not None
    assert reused._loaded.embeddings.encoded == 7  # the pool that all frames come from


@pytest.mark.parametrize("dedup", [None, False])
def test_clip_scores_the_same_alone_and_in_a_batch(folder: Path, dedup: bool | None) -> None:
    scorer = HuggingFaceScorer(folder, ASK, dedup=dedup)
    clips = some_clips()
    alone = torch.cat([scores(scorer, clips[k : k + 1]) for k in range(len(clips))])
    close(scores(scorer, clips), alone)
    close(scores(HuggingFaceScorer(folder, ASK, dedup=dedup, batch_clips=2), clips), alone)


def test_a_cache_too_small_for_a_batch_changes_no_score(folder: Path) -> None:
    small = HuggingFaceScorer(folder, ASK, cache_megabytes=0.0005)
    clips = some_clips()
    close(scores(small, clips), scores(HuggingFaceScorer(folder, ASK, dedup=False), clips))
    assert small._loaded is not None
    assert small._loaded.embeddings is not None
    assert small._loaded.embeddings.nbytes <= 500


def test_several_prompts_score_their_maximum(folder: Path) -> None:
    clips = some_clips()
    each = [scores(HuggingFaceScorer(folder, p), clips) for p in (ASK, OTHER)]
    assert not torch.allclose(*each)
    close(scores(HuggingFaceScorer(folder, (ASK, OTHER)), clips), torch.stack(each).amax(0))


def test_score_is_yes_over_yes_and_no(folder: Path) -> None:
    """Against the model's own softmax over the whole vocabulary, computed by hand."""
    scorer = HuggingFaceScorer(folder, ASK, dedup=False)
    clips = some_clips(2)
    scorer.load()
    loaded = scorer._loaded
    assert loaded is not None
    inputs = loaded.processed(clips["clip"], [ASK, ASK])
    p = loaded.model(**inputs).logits[:, -1].softmax(-1)
    yes, no = p[:, loaded.yes].sum(-1), p[:, loaded.no].sum(-1)
    close(scores(scorer, clips), yes / (yes + no))


def test_order_of_frames_matters(folder: Path) -> None:
    scorer = HuggingFaceScorer(folder, ASK)
    clips = some_clips()
    flipped = TensorDict({"clip": clips["clip"].flip(1)}, clips.batch_size)
    assert not torch.allclose(scores(scorer, clips), scores(scorer, flipped), atol=1e-6)


def test_answer_tokens_are_whole_words() -> None:
    tokenizer = build_tokenizer()
    yes, no = answer_ids(tokenizer)
    assert {tokenizer.decode([i]).strip().lower() for i in yes} == {"yes"}
    assert {tokenizer.decode([i]).strip().lower() for i in no} == {"no"}


class OneToken:
    """A tokenizer that knows no words: everything is its one unknown token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3]

    def decode(self, ids: list[int]) -> str:
        return "?"


class Letters(OneToken):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_overlapping_answer_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="mean Yes and No alike"):
        answer_ids(OneToken())


def test_tokenizer_without_a_single_token_yes_is_refused() -> None:
    with pytest.raises(ValueError, match="no single token for 'Yes'"):
        answer_ids(Letters())


class Pieces(OneToken):
    """Each space is a token, and each run of letters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [sum(map(ord, piece)) for piece in re.findall(r"\w+|\W", text)]


def test_a_space_of_its_own_before_the_answer_is_part_of_the_prefix() -> None:
    """Else the model would say that space next, and Yes and No only after it."""
    assert answer_start(Pieces(), "Answer:") == "Answer: "
    assert answer_start(build_tokenizer(), "Answer:") == "Answer:"
    assert answer_start(Pieces(), "") == ""


def test_scorer_pickles_small_before_and_after_it_loaded(folder: Path) -> None:
    scorer = HuggingFaceScorer(folder, ASK)
    clips = some_clips()
    assert len(pickle.dumps(scorer)) < 4000
    before = scores(pickle.loads(pickle.dumps(scorer)), clips)
    after = scores(scorer, clips)
    assert len(pickle.dumps(scorer)) < 4000
    close(before, after)
    close(scores(pickle.loads(pickle.dumps(scorer)), clips), after)


def test_weights_stay_out_of_checkpoints(folder: Path) -> None:
    scorer = HuggingFaceScorer(folder, ASK)
    scorer.load()
    assert not scorer.state_dict()


def test_missing_folder_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        HuggingFaceScorer(tmp_path / "nowhere", ASK)


def test_hub_name_is_taken_without_a_look_at_the_hub() -> None:
    assert HuggingFaceScorer("facebook/Perception-LM-1B", ASK)._loaded is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ()}, "at least one question"),
        ({"prompts": (ASK, " ")}, "none of them empty"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"batch_clips": 0}, "batch_clips=0"),
        ({"dtype": "float33"}, "dtype='float33'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"frames": 0}, "frames=0"),
        ({"resolution": -1}, "resolution=-1"),
        ({"answer_prefix": "Answer: "}, "answer_prefix=.*without a space"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceScorer("some/name", **arguments)
