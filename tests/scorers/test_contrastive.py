"""Contrastive judges of every family, with random weights: no judgement, only arithmetic.

What every family computes by hand is tested every time; the rest on CLIP, whose frames are looked
at one by one, and X-CLIP, whose are not, and on the others by the slow tests.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL.Image import Resampling
from tensordict import TensorDict
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from tests.scorers.contrastive_models import (
    BASELINE,
    FAMILIES,
    GOAL,
    PATCH,
    PATCHES,
    PIXELS,
    TEXT_TOKENS,
    X_CLIP_FRAMES,
    close,
    model_and_processor,
    scorer_of,
    scores,
    some_clips,
)
from vlmrb_torchrl.scorers import ContrastiveScorer, EmbeddedJudge, local
from vlmrb_torchrl.scorers.embedded import FOLDER

OTHER = "an open door"
FRAME_WISE = ("clip", "siglip", "siglip2")
Folders = Callable[[str], Path]

each_family = pytest.mark.parametrize(
    "family",
    [f if f in ("clip", "x_clip") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
each_frame_wise_family = pytest.mark.parametrize("family", FRAME_WISE)


def by_hand(family: str, folder: Path, clip: Tensor) -> Any:
    """What the model says of a clip's frames and the captions goal and baseline."""
    model, processor = model_and_processor(folder)
    pad: dict[str, Any] = {"padding": True}
    if "siglip" in family:
        pad = {"padding": "max_length", "max_length": TEXT_TOKENS, "return_attention_mask": False}
    inputs = processor(
        images=list(clip),
        text=[GOAL, BASELINE],
        return_tensors="pt",
        **pad,
        **({"patch_size": PATCH, "max_num_patches": PATCHES} if family == "siglip2" else {}),
    )
    with torch.no_grad():
        return model(**inputs)


# ---------------------------------------------------------------- the score


@each_frame_wise_family
def test_score_is_the_softmax_of_the_best_frame_or_of_their_mean(
    family: str, folder_of: Folders
) -> None:
    """SigLIP adds a bias to both logits, so it cancels."""
    (clip,) = some_clips(1)
    said = by_hand(family, folder_of(family), clip)
    logits = said.logits_per_image
    expected = (logits[:, 0] - logits[:, 1]).max().sigmoid()
    close(scores(scorer_of(folder_of(family)), clip[None])[0], expected)

    frames = said.image_embeds / said.image_embeds.norm(dim=-1, keepdim=True)
    mean = frames.mean(0) / frames.mean(0).norm()
    goal, baseline = said.text_embeds / said.text_embeds.norm(dim=-1, keepdim=True)
    expected = (3.0 * (mean @ goal - mean @ baseline)).sigmoid()
    of_mean = scorer_of(folder_of(family), pooling="mean", scale=3.0)
    close(scores(of_mean, clip[None])[0], expected)


@pytest.mark.parametrize(
    ("frames", "looked_at"), [(4, [0, 1, 2, 3]), (2, [0, 1, 1, 1]), (8, [1, 3, 5, 7])]
)
def test_x_clip_looks_at_as_many_outcomes_as_it_was_trained_with(
    folder_of: Folders, frames: int, looked_at: list[int]
) -> None:
    """Spread evenly with the last among them; of fewer, the last again."""
    assert len(looked_at) == X_CLIP_FRAMES
    (clip,) = some_clips(1, frames)
    logits = by_hand("x_clip", folder_of("x_clip"), clip[looked_at]).logits_per_video[0]
    expected = (logits[0] - logits[1]).sigmoid()
    close(scores(scorer_of(folder_of("x_clip")), clip[None])[0], expected)


@each_family
def test_clip_scores_the_same_alone_in_a_batch_and_in_another_order(
    family: str, folder_of: Folders
) -> None:
    scorer, plain = scorer_of(folder_of(family)), scorer_of(folder_of(family), dedup=False)
    clips, order = some_clips(), torch.tensor([3, 0, 4, 2, 1])
    together = scores(plain, clips)
    assert together.unique().numel() > 1
    close(torch.cat([scores(plain, clip[None]) for clip in clips]), together)
    close(scores(plain, clips[order]), together[order])
    plain.batch_clips = 2
    close(scores(plain, clips), together)
    for _ in range(2):
        close(scores(scorer, clips), together)
    close(scores(scorer, clips[order]), together[order])
    assert scores(scorer, clips[:0]).shape == (0,)
    assert plain._loaded.embeddings is None
    if family in FRAME_WISE:
        different = len({frame.numpy().tobytes() for frame in clips.flatten(0, 1)})
        assert scorer._loaded.embeddings.encoded == different
        filled = torch.cat([clips, clips[:, -1:], clips[:, -1:]], 1)  # as an episode's last clip
        close(scores(scorer, filled), together)


@each_family
def test_clips_of_another_length_are_scored_by_the_same_scorer(
    family: str, folder_of: Folders
) -> None:
    scorer = scorer_of(folder_of(family))
    for frames in (1, 9, 3):
        clips = some_clips(2, frames)
        close(scores(scorer, clips), scores(scorer_of(folder_of(family)), clips))
    clips, scorer.frames = some_clips(4, 8), 2
    close(scores(scorer, clips), scores(scorer_of(folder_of(family)), clips[:, [3, 7]]))


@each_family
def test_several_prompts_score_their_maximum_and_look_at_the_clip_once(
    family: str, folder_of: Folders
) -> None:
    """Prompts of unequal length, so that one of them is padded."""
    scorer, clips = scorer_of(folder_of(family), dedup=False), some_clips()
    each = [scores(scorer_of(folder_of(family), prompt), clips) for prompt in (GOAL, OTHER)]
    assert not torch.allclose(*each)
    close(scores(scorer, clips), each[0])
    both, looks = scorer.asking((GOAL, OTHER)), []
    assert both._loaded is scorer._loaded
    scorer._loaded.model.vision_model.register_forward_hook(lambda *_: looks.append(1))
    close(scores(both, clips), torch.stack(each).amax(0))
    assert len(looks) == 1
    assert both.score_prompts(TensorDict({"clip": clips}, [5])).shape == (5, 2)
    close(scores(scorer, clips), each[0])
    assert both.fingerprint != scorer.fingerprint
    same = scorer.asking(BASELINE)  # a goal that is the baseline: exactly one half
    assert torch.equal(scores(same, clips), torch.full((5,), 0.5))


@each_family
def test_order_of_frames_matters_to_x_clip_alone(family: str, folder_of: Folders) -> None:
    scorer, clips = scorer_of(folder_of(family)), some_clips(5, X_CLIP_FRAMES)
    same = torch.allclose(scores(scorer, clips), scores(scorer, clips.flip(1)), atol=1e-6)
    assert same == (family != "x_clip")


@each_family
def test_bfloat16_scores_nearly_the_same(family: str, folder_of: Folders) -> None:
    """Embeddings have 8 bits, so cosines err by some 2⁻⁸ and evidence by that times e²."""
    clips, scorer = some_clips(), scorer_of(folder_of(family))
    rounded = scores(scorer_of(folder_of(family), dtype="bfloat16"), clips)
    torch.testing.assert_close(rounded, scores(scorer, clips), atol=0.05, rtol=0)
    assert {p.dtype for p in scorer._loaded.model.parameters()} == {torch.float32}
    assert scorer_of(folder_of(family), device="cuda").dtype == "bfloat16"


# On a GPU. A score's slope over the difference of cosines is scale / 4 at most, here e² / 4.

RESIZED, OWN_SIZE = 5e-3 * math.e**2 / 4, 1e-4 * math.e**2 / 4


def resized_as_on_a_gpu(clips: Tensor, scorer: ContrastiveScorer) -> Tensor:
    """In floating point, rounded once at the end; a CPU resizes uint8 in whole numbers."""
    scorer.load()
    processor = scorer._loaded.processor.image_processor
    way = InterpolationMode[Resampling(processor.resample).name]
    frames = resize(clips.flatten(0, 1).float(), [PIXELS, PIXELS], way, antialias=True)
    return frames.round().clamp(0, 255).byte().view(*clips.shape[:3], PIXELS, PIXELS)


def tf32(value: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, as cuDNN does with what float32 convolutions read."""
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@each_family
def test_frames_and_convolutions_as_on_a_gpu_score_within_the_bounds(
    family: str, folder_of: Folders
) -> None:
    """Noise, the worst of pictures; a pixel comes out another by one of 255 or, bicubic, more."""
    plain, rounded = (scorer_of(folder_of(family)) for _ in range(2))
    clips = some_clips()
    there, expected = resized_as_on_a_gpu(clips, plain), scores(plain, clips)
    resized = scores(plain, there)
    torch.testing.assert_close(resized, expected, atol=RESIZED, rtol=0)
    assert not torch.allclose(resized, expected, atol=OWN_SIZE, rtol=0)
    rounded.load()
    for module in rounded._loaded.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.copy_(tf32(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(tf32, inputs)))
    torch.testing.assert_close(scores(rounded, there), resized, atol=OWN_SIZE, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_scores_as_the_cpu(family: str, folder_of: Folders) -> None:
    here = scorer_of(folder_of(family))
    there = scorer_of(folder_of(family), device="cuda", dtype="float32")
    clips = some_clips()
    for frames, bound in ((clips, RESIZED), (resized_as_on_a_gpu(clips, here), OWN_SIZE)):
        on_gpu = scores(there, frames.cuda()).cpu()
        torch.testing.assert_close(on_gpu, scores(here, frames), atol=bound, rtol=0)


# ---------------------------------------------------------------- what is loaded, what travels


def changed(folder: Path, weight: str) -> None:
    """Save the model again with the sign of a weight turned."""
    model, _ = model_and_processor(folder)
    with torch.no_grad():
        model.get_parameter(weight).neg_()
    model.save_pretrained(folder)


def loaded(folder: Path) -> ContrastiveScorer:
    scorer = scorer_of(folder)
    scorer.load()
    return scorer


def test_fingerprint_tells_weights_apart(folder_of: Folders, tmp_path: Path) -> None:
    """Not places; and before they are loaded it knows of none."""
    copy = shutil.copytree(folder_of("clip"), tmp_path / "clip")
    scorer, late, elsewhere = loaded(copy), loaded(copy), scorer_of(folder_of("clip"))
    before = scorer.fingerprint
    assert elsewhere.revision == ""
    elsewhere.load()
    assert elsewhere.revision == scorer.revision
    changed(copy, "logit_scale")
    assert loaded(copy).fingerprint != before
    for each in (scorer, late):
        assert each.fingerprint == before, "of the weights that it holds, not of today's folder"


def test_files_are_digested_when_a_fingerprint_is_asked_for_and_once(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    original = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        digested.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    local._digest.cache_clear()
    scorer, again = (loaded(folder_of("clip")) for _ in range(2))
    scores(scorer, some_clips())
    assert not digested, "loading and scoring read no file twice"
    assert scorer.fingerprint == again.fingerprint == scorer.fingerprint
    assert sorted(digested) == sorted(p.name for p in folder_of("clip").iterdir())


def test_weights_that_changed_before_they_were_digested_are_like_no_others(
    folder_of: Folders, tmp_path: Path
) -> None:
    """What was read is gone, and its successor's digest would be another model's."""
    copy = shutil.copytree(folder_of("clip"), tmp_path / "clip")
    scorer = loaded(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert scorer.fingerprint == scorer.fingerprint != loaded(copy).fingerprint


def test_kept_embeddings_are_of_use_to_the_same_judge_alone(
    folder_of: Folders, tmp_path: Path
) -> None:
    """A resumed run may find other weights in the folder that its checkpoint was made with."""
    clips, copy = some_clips(), shutil.copytree(folder_of("clip"), tmp_path / "clip")
    before, again = scorer_of(copy), scorer_of(copy)
    assert before.kept_state() is None
    expected = scores(before, clips)
    again.load_kept_state(before.kept_state())
    assert torch.equal(scores(again, clips), expected)
    assert again._loaded.embeddings.encoded == 0
    changed(copy, "visual_projection.weight")
    other, fresh = scorer_of(copy), scorer_of(copy)
    other.load_kept_state(before.kept_state())
    assert torch.equal(scores(other, clips), scores(fresh, clips))
    assert not torch.equal(scores(other, clips), expected)


def test_another_reader_of_the_same_weights_is_another_judge(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = loaded(folder_of("clip"))
    before = scorer.fingerprint
    scorer._device = torch.device("cuda")
    on_gpu = scorer.fingerprint
    monkeypatch.setattr(local, "version", lambda package: "4.0")
    assert len({before, on_gpu, scorer.fingerprint}) == 3


def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughError(Exception):
        pass

    def asked(name: str, **options: Any) -> Any:
        assert (name, options) == ("some/name", {"revision": "abc", "trust_remote_code": False})
        raise EnoughError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)
    scorer = ContrastiveScorer("some/name", revision="abc")
    with pytest.raises(EnoughError):
        scorer.load()
    assert scorer.revision == "abc"
    assert ContrastiveScorer("some/name").fingerprint != scorer.fingerprint


def test_what_a_model_cannot_do_is_refused_in_one_line_when_it_loads(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter is a token, and the end is one more."""
    long = "x" * TEXT_TOKENS
    fits = loaded(folder_of("clip")).asking(long[1:])
    scores(fits, some_clips(1))
    too_long = "clip reads at most 64 tokens of its 65, shorten it"
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", scorer_of)  # is not reached
    for refused, message in (
        (lambda: scores(fits.asking(long), some_clips(1)), too_long),
        (lambda: ContrastiveScorer(FOLDER).load(), "a perception_lm, .*use HuggingFaceScorer"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=too_long):
        scorer_of(folder_of("clip"), long).load()
    with pytest.raises(ValueError, match=r"dedup is True: xclip looks at all frames together"):
        scorer_of(folder_of("x_clip"), dedup=True).load()


def test_model_without_a_scale_asks_for_one(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = transformers.AutoModel.from_pretrained

    def without_scale(name: str, **options: Any) -> Any:
        model = read(name, **options)
        del model.logit_scale
        return model

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", without_scale)
    with pytest.raises(ValueError, match=r"scale is None: .* has no logit scale, pass one"):
        scorer_of(folder_of("clip")).load()
    assert scores(scorer_of(folder_of("clip"), scale=10.0), some_clips()).shape == (5,)


def test_arguments_that_other_judges_have_too_have_the_same_defaults() -> None:
    """On the command line a judge takes over the values of the one it replaces."""
    ours, theirs = (signature(judge).parameters for judge in (ContrastiveScorer, EmbeddedJudge))
    shared = set(ours) & set(theirs)
    assert shared >= {"device", "batch_clips", "dedup", "cache_megabytes"}
    assert {n: ours[n].default for n in shared} == {n: theirs[n].default for n in shared}
