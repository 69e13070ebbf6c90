"""What contrastive judges load, what travels with them, and what they refuse."""

from __future__ import annotations

import hashlib
import pickle
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scorers.contrastive_models import (
    FAMILIES,
    GOAL,
    model_and_processor,
    scorer_of,
    scores,
    some_clips,
)
from vlmrb_torchrl.scorers import (
    ContrastiveScorer,
    EmbeddedJudge,
    contrastive_model,
    local,
    pretrained,
)
from vlmrb_torchrl.scorers.embedded import FOLDER


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("contrastive")
    return {name: FAMILIES[name](folder / name) for name in ("clip", "x_clip")}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_weights_are_float32_on_the_cpu(dtype: str | None, folders: dict[str, Path]) -> None:
    scorer = scorer_of(folders["clip"], dtype=dtype)
    scorer.load()
    assert scorer._loaded is not None
    assert {p.dtype for p in scorer._loaded.model.parameters()} == {torch.float32}
    assert scorer_of(folders["clip"], device="cuda").dtype == "bfloat16"


@pytest.mark.parametrize("family", ["clip", "x_clip"])
def test_scorer_pickles_small_before_and_after_it_loaded(
    family: str, folders: dict[str, Path]
) -> None:
    scorer, clips = scorer_of(folders[family]), some_clips()
    assert len(pickle.dumps(scorer)) < 4000
    before = scores(pickle.loads(pickle.dumps(scorer)), clips)
    assert torch.equal(before, scores(scorer, clips))
    assert len(pickle.dumps(scorer)) < 4000
    assert torch.equal(before, scores(pickle.loads(pickle.dumps(scorer)), clips))
    assert not scorer.state_dict()


def test_fingerprint_tells_weights_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    FAMILIES["clip"](copy)
    scorer, again, late = (scorer_of(copy) for _ in range(3))
    for each in (scorer, again, late):
        each.load()
    before = scorer.fingerprint
    assert again.fingerprint == before
    model, _ = model_and_processor(copy)
    with torch.no_grad():
        model.logit_scale.add_(1.0)
    model.save_pretrained(copy)
    changed = scorer_of(copy)
    changed.load()
    assert changed.fingerprint != before
    for each in (scorer, late):
        assert each.fingerprint == before, "of the weights that it holds, not of today's folder"


def test_files_are_digested_when_a_fingerprint_is_asked_for_and_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    original = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        digested.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    pretrained._digest.cache_clear()
    scorer, again = (scorer_of(folders["clip"]) for _ in range(2))
    for each in (scorer, again):
        scores(each, some_clips())
    assert not digested, "loading and scoring read no file twice"
    assert scorer.fingerprint == again.fingerprint == scorer.fingerprint
    assert sorted(digested) == sorted(p.name for p in folders["clip"].iterdir())


def test_weights_that_changed_before_they_were_digested_are_like_no_others(tmp_path: Path) -> None:
    """What was read is gone, and its successor's digest would be another model's."""
    FAMILIES["clip"](tmp_path)
    scorer, other = scorer_of(tmp_path), scorer_of(tmp_path)
    scorer.load()
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    other.load()
    assert scorer.fingerprint == scorer.fingerprint != other.fingerprint


def test_kept_embeddings_are_of_use_to_the_same_judge_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A resumed run may find other weights in the folder that its checkpoint was made with."""
    clips, copy = some_clips(), tmp_path / "clip"
    FAMILIES["clip"](copy)
    before = scorer_of(copy)
    scores(before, clips)
    state = before.kept_state()
    again = scorer_of(copy)
    again.load_kept_state(state)
    assert torch.equal(scores(again, clips), scores(before, clips))
    assert again._loaded.embeddings.encoded == 0
    model, _ = model_and_processor(copy)
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    model.save_pretrained(copy)
    changed, fresh = scorer_of(copy), scorer_of(copy)
    changed.load_kept_state(state)
    assert torch.equal(scores(changed, clips), scores(fresh, clips))
    assert not torch.equal(scores(changed, clips), scores(before, clips))


@pytest.mark.parametrize("what", ["transformers", "device"])
def test_another_reader_of_the_same_weights_is_another_judge(
    what: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(folders["clip"])
    scorer.load()
    before = scorer.fingerprint
    if what == "transformers":
        monkeypatch.setattr(local, "version", lambda package: "4.0")
    else:
        scorer._device = torch.device("cuda")
    assert scorer.fingerprint != before


def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughError(Exception):
        pass

    def asked(name: str, auto_class: str, **options: Any) -> Any:
        assert (name, options) == ("some/name", {"revision": "abc"})
        raise EnoughError

    monkeypatch.setattr(contrastive_model, "read_pretrained", asked)
    scorer = ContrastiveScorer("some/name", revision="abc")
    with pytest.raises(EnoughError):
        scorer.load()
    assert scorer.revision == "abc"
    assert ContrastiveScorer("some/name").fingerprint != scorer.fingerprint


def test_missing_folder_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ContrastiveScorer(tmp_path / "nowhere")


def test_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors.*save_pretrained"):
        ContrastiveScorer(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ()}, "at least one question"),
        ({"prompts": (GOAL, " ")}, "none of them empty"),
        ({"baseline": ""}, "none of them empty"),
        ({"pooling": "median"}, r"pooling='median': say one of \('max', 'mean'\)"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"frames": 0}, "frames=0"),
        ({"batch_clips": -1}, "batch_clips=-1"),
        ({"dtype": "float33"}, "dtype='float33'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveScorer("some/name", **arguments)


def test_model_that_embeds_no_captions_is_refused_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    original = contrastive_model.read_pretrained

    def watched(name: str, auto_class: str, **options: Any) -> tuple[Any, Any]:
        read.append(auto_class)
        return original(name, auto_class, **options)

    monkeypatch.setattr(contrastive_model, "read_pretrained", watched)
    with pytest.raises(ValueError, match=r"is a perception_lm, .*use HuggingFaceScorer") as refusal:
        ContrastiveScorer(FOLDER).load()
    assert "\n" not in str(refusal.value)
    assert read == ["AutoConfig"]


def test_dedup_is_refused_where_frames_are_looked_at_together(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="dedup=True: xclip looks at all frames together"):
        scorer_of(folders["x_clip"], dedup=True).load()


def test_model_without_a_scale_asks_for_one(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = contrastive_model.read_pretrained

    def without_scale(name: str, auto_class: str, **options: Any) -> tuple[Any, Any]:
        processor, model = original(name, auto_class, **options)
        if auto_class == "AutoModel":
            del model.logit_scale
        return processor, model

    monkeypatch.setattr(contrastive_model, "read_pretrained", without_scale)
    with pytest.raises(ValueError, match=r"scale=None: .* has no logit scale, pass one"):
        scorer_of(folders["clip"]).load()
    assert scores(scorer_of(folders["clip"], scale=10.0), some_clips()).shape == (5,)


def test_arguments_that_other_judges_have_too_have_the_same_defaults() -> None:
    """On the command line a judge takes over the values of the one it replaces."""
    ours, theirs = (signature(judge).parameters for judge in (ContrastiveScorer, EmbeddedJudge))
    shared = set(ours) & set(theirs)
    assert shared >= {"device", "batch_clips", "dedup", "cache_megabytes"}
    assert {n: ours[n].default for n in shared} == {n: theirs[n].default for n in shared}
