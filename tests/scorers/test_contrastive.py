"""Contrastive judges of every family, with random weights: no judgement, only arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
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
from vlmrb_torchrl.scorers import ContrastiveScorer

OTHER = "an open door"
FRAME_WISE = [name for name in FAMILIES if name != "x_clip"]

each_family = pytest.mark.parametrize("family", FAMILIES)
each_frame_wise_family = pytest.mark.parametrize("family", FRAME_WISE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("contrastive")
    return {name: build(folder / name) for name, build in FAMILIES.items()}


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


def test_families_are_reloaded_by_their_own_classes(folders: dict[str, Path]) -> None:
    classes = {name: type(model_and_processor(folders[name])[0]).__name__ for name in folders}
    assert classes == {
        "clip": "CLIPModel",
        "siglip": "SiglipModel",
        "siglip2": "Siglip2Model",
        "x_clip": "XCLIPModel",
    }


@each_frame_wise_family
def test_score_is_the_softmax_of_the_best_frame(family: str, folders: dict[str, Path]) -> None:
    """SigLIP adds a bias to both logits, so it cancels."""
    (clip,) = some_clips(1)
    logits = by_hand(family, folders[family], clip).logits_per_image
    expected = (logits[:, 0] - logits[:, 1]).max().sigmoid()
    close(scores(scorer_of(folders[family]), clip[None])[0], expected)


@each_frame_wise_family
def test_mean_pooling_compares_the_mean_of_the_frames(
    family: str, folders: dict[str, Path]
) -> None:
    (clip,) = some_clips(1)
    said = by_hand(family, folders[family], clip)
    frames = said.image_embeds / said.image_embeds.norm(dim=-1, keepdim=True)
    mean = frames.mean(0) / frames.mean(0).norm()
    goal, baseline = said.text_embeds / said.text_embeds.norm(dim=-1, keepdim=True)
    expected = (3.0 * (mean @ goal - mean @ baseline)).sigmoid()
    close(scores(scorer_of(folders[family], pooling="mean", scale=3.0), clip[None])[0], expected)


@pytest.mark.parametrize(
    ("frames", "looked_at"), [(4, [0, 1, 2, 3]), (2, [0, 1, 1, 1]), (8, [1, 3, 5, 7])]
)
def test_x_clip_looks_at_as_many_outcomes_as_it_was_trained_with(
    folders: dict[str, Path], frames: int, looked_at: list[int]
) -> None:
    """Spread evenly with the last among them; of fewer, the last again."""
    assert len(looked_at) == X_CLIP_FRAMES
    (clip,) = some_clips(1, frames)
    logits = by_hand("x_clip", folders["x_clip"], clip[looked_at]).logits_per_video[0]
    expected = (logits[0] - logits[1]).sigmoid()
    close(scores(scorer_of(folders["x_clip"]), clip[None])[0], expected)


@each_family
@pytest.mark.parametrize("dedup", [None, False])
def test_clip_scores_the_same_alone_in_a_batch_and_in_another_order(
    family: str, dedup: bool | None, folders: dict[str, Path]
) -> None:
    scorer = scorer_of(folders[family], dedup=dedup)
    clips = some_clips()
    together = scores(scorer, clips)
    assert together.unique().numel() > 1
    close(torch.cat([scores(scorer, clip[None]) for clip in clips]), together)
    order = torch.tensor([3, 0, 4, 2, 1])
    close(scores(scorer, clips[order]), together[order])
    close(scores(scorer_of(folders[family], dedup=dedup, batch_clips=2), clips), together)


@each_family
def test_clips_of_another_length_are_scored_by_the_same_scorer(
    family: str, folders: dict[str, Path]
) -> None:
    scorer = scorer_of(folders[family])
    for frames in (1, 9, 3):
        clips = some_clips(2, frames)
        close(scores(scorer, clips), scores(scorer_of(folders[family]), clips))


@each_frame_wise_family
def test_repeating_the_last_frame_changes_no_maximum(family: str, folders: dict[str, Path]) -> None:
    """As the last clip of an episode is filled up."""
    scorer, clips = scorer_of(folders[family]), some_clips()
    close(
        scores(scorer, torch.cat([clips, clips[:, -1:], clips[:, -1:]], 1)), scores(scorer, clips)
    )


@each_frame_wise_family
def test_reused_frame_embeddings_change_no_score(family: str, folders: dict[str, Path]) -> None:
    plain, reused = scorer_of(folders[family], dedup=False), scorer_of(folders[family])
    clips = some_clips()
    expected = scores(plain, clips)
    for _ in range(2):
        close(scores(reused, clips), expected)
    assert plain._loaded is not None
    assert plain._loaded.embeddings is None
    assert reused._loaded is not None
    assert reused._loaded.embeddings is not None
    different = len({frame.numpy().tobytes() for frame in clips.flatten(0, 1)})
    assert reused._loaded.embeddings.encoded == different


@each_family
def test_goal_that_is_the_baseline_scores_exactly_one_half(
    family: str, folders: dict[str, Path]
) -> None:
    scorer = scorer_of(folders[family], BASELINE)
    assert torch.equal(scores(scorer, some_clips()), torch.full((5,), 0.5))


@each_family
def test_several_prompts_score_their_maximum(family: str, folders: dict[str, Path]) -> None:
    """Prompts of unequal length, so that one of them is padded."""
    clips = some_clips()
    each = [scores(scorer_of(folders[family], prompt), clips) for prompt in (GOAL, OTHER)]
    assert not torch.allclose(*each)
    close(scores(scorer_of(folders[family], (GOAL, OTHER)), clips), torch.stack(each).amax(0))


@each_family
def test_several_prompts_look_at_the_clip_once(family: str, folders: dict[str, Path]) -> None:
    scorer = scorer_of(folders[family], (GOAL, OTHER), dedup=False)
    scorer.load()
    assert scorer._loaded is not None
    looks: list[int] = []
    scorer._loaded.model.vision_model.register_forward_hook(lambda *_: looks.append(1))
    assert scorer.score_prompts(TensorDict({"clip": some_clips()}, [5])).shape == (5, 2)
    assert len(looks) == 1


@each_family
def test_asked_something_else_it_keeps_what_it_loaded(
    family: str, folders: dict[str, Path]
) -> None:
    scorer, clips = scorer_of(folders[family]), some_clips()
    first = scores(scorer, clips)
    other = scorer.asking(OTHER)
    assert other._loaded is scorer._loaded
    close(scores(other, clips), scores(scorer_of(folders[family], OTHER), clips))
    close(scores(scorer, clips), first)
    assert other.fingerprint != scorer.fingerprint


@each_family
def test_order_of_frames_matters_to_x_clip_alone(family: str, folders: dict[str, Path]) -> None:
    scorer, clips = scorer_of(folders[family]), some_clips(5, X_CLIP_FRAMES)
    same = torch.allclose(scores(scorer, clips), scores(scorer, clips.flip(1)), atol=1e-6)
    assert same == (family != "x_clip")


@each_family
def test_no_clips_no_scores(family: str, folders: dict[str, Path]) -> None:
    empty = torch.zeros(0, 4, 3, 64, 64, dtype=torch.uint8)
    assert scores(scorer_of(folders[family]), empty).shape == (0,)


def test_only_the_frames_asked_for_are_looked_at(folders: dict[str, Path]) -> None:
    clips = some_clips(4, 8)
    thinned = scores(scorer_of(folders["clip"], frames=2), clips)
    close(thinned, scores(scorer_of(folders["clip"]), clips[:, [3, 7]]))


@each_family
def test_bfloat16_scores_nearly_the_same(family: str, folders: dict[str, Path]) -> None:
    """Embeddings have 8 bits, so cosines err by some 2⁻⁸ and evidence by that times e²."""
    clips = some_clips()
    rounded = scores(scorer_of(folders[family], dtype="bfloat16"), clips)
    torch.testing.assert_close(
        rounded, scores(scorer_of(folders[family]), clips), atol=0.05, rtol=0
    )


def test_prompt_longer_than_the_model_reads_is_refused(folders: dict[str, Path]) -> None:
    """A letter is a token, and the end is one more."""
    fits = scorer_of(folders["clip"], "x" * (TEXT_TOKENS - 1))
    fits.load()
    message = "has 65 tokens, clip reads at most 64: say it shorter"
    with pytest.raises(ValueError, match=message):
        scorer_of(folders["clip"], "x" * TEXT_TOKENS).load()
    with pytest.raises(ValueError, match=message):
        scores(fits.asking("x" * TEXT_TOKENS), some_clips(1))


# On a GPU. A score's slope over the difference of cosines is scale / 4 at most, here e² / 4.

RESIZED, OWN_SIZE = 5e-3 * math.e**2 / 4, 1e-4 * math.e**2 / 4


def resized_as_on_a_gpu(clips: Tensor, scorer: ContrastiveScorer) -> Tensor:
    """In floating point, rounded once at the end; a CPU resizes uint8 in whole numbers."""
    scorer.load()
    assert scorer._loaded is not None
    processor = scorer._loaded.processor.image_processor
    way = InterpolationMode[Resampling(processor.resample).name]
    frames = resize(clips.flatten(0, 1).float(), [PIXELS, PIXELS], way, antialias=True)
    return frames.round().clamp(0, 255).byte().view(*clips.shape[:3], PIXELS, PIXELS)


def tf32(value: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, as cuDNN does with what float32 convolutions read."""
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@each_family
def test_frames_resized_as_on_a_gpu_score_within_the_bound(
    family: str, folders: dict[str, Path]
) -> None:
    """Noise, the worst of pictures; a pixel comes out another by one of 255 or, bicubic, more."""
    scorer, clips = scorer_of(folders[family]), some_clips()
    there = resized_as_on_a_gpu(clips, scorer)
    expected = scores(scorer, clips)
    torch.testing.assert_close(scores(scorer, there), expected, atol=RESIZED, rtol=0)
    assert not torch.allclose(scores(scorer, there), expected, atol=OWN_SIZE, rtol=0)


@each_family
def test_convolutions_as_on_a_gpu_score_within_the_bound(
    family: str, folders: dict[str, Path]
) -> None:
    plain, rounded = (scorer_of(folders[family]) for _ in range(2))
    clips = resized_as_on_a_gpu(some_clips(), plain)
    rounded.load()
    assert rounded._loaded is not None
    for module in rounded._loaded.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.copy_(tf32(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(tf32, inputs)))
    torch.testing.assert_close(scores(rounded, clips), scores(plain, clips), atol=OWN_SIZE, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_family
def test_gpu_scores_as_the_cpu(family: str, folders: dict[str, Path]) -> None:
    here = scorer_of(folders[family])
    there = scorer_of(folders[family], device="cuda", dtype="float32")
    clips = some_clips()
    for frames, bound in ((clips, RESIZED), (resized_as_on_a_gpu(clips, here), OWN_SIZE)):
        on_gpu = scores(there, frames.cuda()).cpu()
        torch.testing.assert_close(on_gpu, scores(here, frames), atol=bound, rtol=0)
