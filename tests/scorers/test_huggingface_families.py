"""One path for every family, on tiny models of random weights: only arithmetic is tested."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchvision.transforms.v2 import functional

from tests.scorers.distributions import DISTRIBUTIONS
from tests.scorers.families import FAMILIES, save, says
from vlmrb_torchrl.scorers import HuggingFaceScorer, embeddings
from vlmrb_torchrl.scorers.vision_language import ENCODED_ONE_BY_ONE, VisionLanguageModel

PROMPTS = (
    "Is the goal reached in this clip? Answer Yes or No.",
    "Is the goal a key?",
    "Does the agent open a door in this clip anywhere? Answer Yes or No.",
)
REUSING = ("perception_lm", "perception_lm_pe", "smolvlm")
OBEDIENT = {"Answer": math.log(0.9), "Yes": math.log(0.02), "No": math.log(0.08)}
"""What it says first, asked to "Output exactly Answer: Yes": read there, the score would be 0.2."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def some_clips(count: int = 4, frames: int = 6) -> TensorDict:
    """Frames repeat, within a clip and across clips."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, 7, (count, frames), generator=generator)
    return TensorDict({"clip": pool[rows]}, [count])


def scores(scorer: HuggingFaceScorer, clips: TensorDict) -> torch.Tensor:
    return scorer(clips.clone())["score"]


def loaded(scorer: HuggingFaceScorer) -> VisionLanguageModel:
    scorer.load()
    assert scorer._loaded is not None
    return scorer._loaded


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dedup", [None, False])
def test_clip_scores_the_same_alone_in_a_batch_and_in_any_order(
    folders: dict[str, Path], family: str, dedup: bool | None
) -> None:
    scorer = HuggingFaceScorer(folders[family], PROMPTS[0], dedup=dedup)
    clips = some_clips()
    whole = scores(scorer, clips)
    assert whole.unique().numel() == 4  # it looks at them
    close(torch.cat([scores(scorer, clips[k : k + 1]) for k in range(4)]), whole)
    close(scores(scorer, clips[[2, 0, 3, 1]]), whole[[2, 0, 3, 1]])


def test_short_clip_filled_up_with_its_last_frame_scores_the_same_beside_longer_ones(
    folders: dict[str, Path], family: str
) -> None:
    """Clips of unequal length reach a scorer as replay cuts them: the last frame repeated."""
    scorer = HuggingFaceScorer(folders[family], PROMPTS[0])
    clips = some_clips()
    clips["clip"][1, 3:] = clips["clip"][1, 2]
    close(scores(scorer, clips)[1:2], scores(scorer, clips[1:2]))


def test_turns_of_unequal_length_in_a_batch_are_padded_on_the_left(
    folders: dict[str, Path], family: str
) -> None:
    """Padded on the right, the last position of the shorter turn would be no answer."""
    model = loaded(HuggingFaceScorer(folders[family], dedup=False))
    frames = some_clips()["clip"][:2]
    with torch.inference_mode():
        together = model._answers(model.processed(frames, PROMPTS[:2]), use_cache=False)
        for k in range(2):
            alone = model._answers(
                model.processed(frames[k : k + 1], [PROMPTS[k]]), use_cache=False
            )
            close(together[k : k + 1], alone)


def test_the_score_is_read_where_an_obedient_model_answers(
    folders: dict[str, Path], family: str
) -> None:
    clips = some_clips(2)
    scorer = HuggingFaceScorer(folders[family], PROMPTS[0])
    at_once = HuggingFaceScorer(folders[family], PROMPTS[0], answer_prefix="")
    for name, (answer, score) in DISTRIBUTIONS.items():
        if name == "every spelling" and family.startswith("perception_lm"):
            continue  # to its tokenizer, YES is three tokens
        says(loaded(scorer), OBEDIENT, answer)
        close(scores(scorer, clips), torch.full((2,), score))
        close(scores(scorer.asking(PROMPTS), clips), torch.full((2,), score))
    if family != "smolvlm":  # whose turn begins after "Assistant:", another colon
        says(loaded(at_once), OBEDIENT, answer)
        close(scores(at_once, clips), torch.full((2,), 0.2))


@pytest.mark.parametrize(
    ("name", "opening", "ending"),
    [
        ("qwen3_vl", "", "<|im_start|>assistant\nAnswer:"),
        ("smolvlm", "", "<end_of_utterance>\nAssistant: Answer:"),
        ("perception_lm", "", "<|end_header_id|>\n\nAnswer:"),
        # Qwen3-VL-Thinking, Qwen3.5: what the template opens is closed, as Qwen writes no thoughts.
        ("qwen3_vl", "{{ '<think>\n' }}", "assistant\n<think>\n\n</think>\n\nAnswer:"),
        (
            "qwen3_vl",
            "{% if enable_thinking is false %}<think></think>\n{% endif %}",
            "assistant\n<think></think>\nAnswer:",
        ),
    ],
)
def test_the_turn_ends_in_the_prefix_and_without_thoughts(
    folders: dict[str, Path], name: str, opening: str, ending: str
) -> None:
    model = loaded(HuggingFaceScorer(folders[name]))
    if opening:
        model.processor.chat_template += opening
    text = model._text(PROMPTS[0])
    assert text.endswith(ending)
    ids = model.processed(some_clips(1)["clip"], [PROMPTS[0]])["input_ids"][0]
    assert model.processor.tokenizer.decode(ids).endswith(ending)


@pytest.mark.filterwarnings("error::FutureWarning")  # of arguments that will be ignored one day
@pytest.mark.parametrize("dedup", [None, False])
def test_each_of_several_prompts_scores_as_if_asked_alone(
    folders: dict[str, Path], family: str, dedup: bool | None
) -> None:
    clips = some_clips()
    together = HuggingFaceScorer(folders[family], PROMPTS, dedup=dedup).score_prompts(clips)
    one = HuggingFaceScorer(folders[family], PROMPTS[0], dedup=dedup)
    alone = torch.stack([scores(one.asking(prompt), clips) for prompt in PROMPTS], 1)
    close(together, alone)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-6)


def test_a_further_prompt_costs_its_own_tokens(folders: dict[str, Path], family: str) -> None:
    """The language model reads one turn and, of the others, what differs from it."""
    model = loaded(HuggingFaceScorer(folders[family], PROMPTS, dedup=False))
    clips = some_clips()["clip"]
    read = []

    def count(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        read.append(output.last_hidden_state.shape[1])

    text = model.model.model
    text = getattr(text, "language_model", None) or text.text_model
    handle = text.register_forward_hook(count, with_kwargs=True)
    model.log_odds(clips, PROMPTS)
    handle.remove()
    turns = [model._turn(clips, prompt)["input_ids"].shape[1] for prompt in PROMPTS]
    assert len(read) == 1 + len(PROMPTS)
    begun = read[0]
    assert read[1:] == [turn - begun for turn in turns]
    assert begun > 0.5 * min(turns)


@pytest.mark.parametrize("name", REUSING)
def test_reused_frame_embeddings_change_no_score(folders: dict[str, Path], name: str) -> None:
    clips = some_clips()
    reused = HuggingFaceScorer(folders[name], PROMPTS[0])
    plain = scores(HuggingFaceScorer(folders[name], PROMPTS[0], dedup=False), clips)
    close(scores(reused, clips), plain)
    close(scores(reused, clips), plain)  # now every frame comes from the cache
    embeddings = loaded(reused).embeddings
    assert embeddings is not None
    assert embeddings.encoded == len(clips["clip"].flatten(0, 1).flatten(1).unique(dim=0))


@pytest.mark.parametrize(("name", "edge"), [("perception_lm_pe", 112), ("smolvlm", 32)])
def test_frames_are_compared_as_drawn_and_each_different_one_is_resized_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, edge: int
) -> None:
    events = []
    digest, resize = embeddings.frame_digests, functional.resize

    def noted_digest(frames: torch.Tensor) -> list[bytes]:
        events.append(("digest", len(frames), frames.shape[-1]))
        return digest(frames)

    def noted_resize(frames: torch.Tensor, size: list[int], **options: Any) -> torch.Tensor:
        events.append(("resize", len(frames), frames.shape[-1]))
        return resize(frames, size, **options)

    scorer = HuggingFaceScorer(folders[name], PROMPTS, resolution=edge)
    clips = some_clips()
    reference = scores(
        HuggingFaceScorer(folders[name], PROMPTS, resolution=edge, dedup=False), clips
    )
    for prompt in PROMPTS:  # resizes a black clip, to count its tokens
        loaded(scorer)._turn(clips["clip"], prompt)
    monkeypatch.setattr(embeddings, "frame_digests", noted_digest)
    monkeypatch.setattr(functional, "resize", noted_resize)
    torch.testing.assert_close(scores(scorer, clips), reference, atol=1e-6, rtol=0)
    different = len(clips["clip"].flatten(0, 1).flatten(1).unique(dim=0))
    assert events == [("digest", 24, 64), ("resize", different, 64)]


@pytest.mark.parametrize("name", ["perception_lm", "smolvlm"])
def test_frames_are_seen_by_a_model_that_takes_no_embeddings_of_them(
    folders: dict[str, Path], name: str
) -> None:
    """As before transformers 5.23, whose models ignore the argument without a word."""
    reused, plain = (HuggingFaceScorer(folders[name], dedup=dedup) for dedup in (None, False))
    model = loaded(reused).model
    real = model.forward

    def forward(*, mm_encoder_outputs: Any = None, **inputs: Any) -> Any:
        return real(**inputs)

    model.forward = forward
    clips = some_clips()
    close(scores(reused, clips), scores(plain, clips))


def test_frames_are_reused_by_default_just_where_they_are_encoded_one_by_one(
    folders: dict[str, Path], family: str
) -> None:
    model = loaded(HuggingFaceScorer(folders[family]))
    assert (model.embeddings is not None) == (family in REUSING)
    assert (family in REUSING) == (model.model.config.model_type in ENCODED_ONE_BY_ONE)


def test_dedup_is_refused_where_frames_are_encoded_together(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="encodes no frame by itself; pass dedup=False"):
        HuggingFaceScorer(folders["qwen3_vl"], dedup=True).load()


def test_attention_implementations_agree(folders: dict[str, Path], family: str) -> None:
    clips = some_clips()
    eager = HuggingFaceScorer(folders[family], attention="eager")
    close(scores(eager, clips), scores(HuggingFaceScorer(folders[family], attention="sdpa"), clips))
    assert loaded(eager).model.config._attn_implementation == "eager"


def test_low_precision_is_near(folders: dict[str, Path], family: str) -> None:
    clips = some_clips()
    low = scores(HuggingFaceScorer(folders[family], dtype="bfloat16"), clips)
    full = scores(HuggingFaceScorer(folders[family]), clips)
    torch.testing.assert_close(low, full, atol=0.03, rtol=0)


def test_subsampled_clip_scores_as_the_clip_of_those_frames(
    folders: dict[str, Path], family: str
) -> None:
    """3 of 6 frames: the second, fourth and sixth."""
    clips = some_clips()
    fewer = TensorDict({"clip": clips["clip"][:, [1, 3, 5]]}, clips.batch_size)
    subsampled = HuggingFaceScorer(folders[family], frames=3)
    close(scores(subsampled, clips), scores(HuggingFaceScorer(folders[family]), fewer))


@pytest.mark.parametrize(
    ("name", "edge", "per_frame"),
    [
        ("perception_lm_pe", 56, 4),  # patches of 14, pooled 2x2
        ("smolvlm", 32, 1),  # patches of 8, shuffled 4x4
        ("qwen2_5_vl", 32, 2),  # patches of 8, merged 2x2, two frames in one
        ("qwen3_vl", 32, 2),
        ("internvl", 32, 4),
    ],
)
def test_resolution_changes_the_tokens_of_a_frame(
    folders: dict[str, Path], name: str, edge: int, per_frame: int
) -> None:
    """Picture tokens of a clip of 6 frames, from the family's patches and poolings."""
    scorer = HuggingFaceScorer(folders[name], resolution=edge)
    clips = some_clips()
    assert scores(scorer, clips).unique().numel() == 4
    model = loaded(scorer)
    ids = model._turn(torch.zeros(1, 6, 3, edge, edge, dtype=torch.uint8), "?")["input_ids"]
    config = model.model.config
    places = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    assert sum(int((ids == place).sum()) for place in places if place is not None) == 6 * per_frame


@pytest.mark.parametrize(
    ("name", "edge"), [("llava_onevision", 32), ("smolvlm", 56), ("qwen3_vl", 60)]
)
def test_resolution_that_a_model_cannot_look_at_is_refused_when_it_loads(
    folders: dict[str, Path], name: str, edge: int
) -> None:
    with pytest.raises(ValueError, match=f"resolution={edge}: this {name} does not") as error:
        HuggingFaceScorer(folders[name], resolution=edge).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "qwen3_vl"])
def test_frames_per_second_reach_the_models_that_are_told_the_time(
    folders: dict[str, Path], name: str
) -> None:
    slow, fast = (HuggingFaceScorer(folders[name], PROMPTS[0], fps=fps) for fps in (0.25, 8.0))
    clips = some_clips()
    assert not torch.allclose(scores(slow, clips), scores(fast, clips), atol=1e-6)
    assert slow.fingerprint != fast.fingerprint


def test_all_frames_are_looked_at(folders: dict[str, Path], family: str) -> None:
    """No processor samples on its own: two clips that differ in one frame score differently."""
    scorer = HuggingFaceScorer(folders[family], PROMPTS[0])
    clips = some_clips(1, 6)["clip"].repeat(6, 1, 1, 1, 1)
    for k in range(6):
        clips[k, k] = 255 - clips[k, k]
    found = scores(scorer, TensorDict({"clip": clips}, [6]))
    assert found.unique().numel() == 6


def test_out_of_memory_halves_the_batch_and_goes_on(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for two: 7 clips at once fail, so do 3 (7 // 2), and 1 (3 // 2) goes through."""
    caplog.set_level(logging.WARNING)
    clips = some_clips(7)
    plain = scores(HuggingFaceScorer(folders["qwen3_vl"]), clips)
    scorer = HuggingFaceScorer(folders["qwen3_vl"])
    sizes = []
    real = VisionLanguageModel.log_odds

    def with_room_for_two(self: Any, part: torch.Tensor, prompts: Any) -> torch.Tensor:
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, part, prompts)

    monkeypatch.setattr(VisionLanguageModel, "log_odds", with_room_for_two)
    close(scores(scorer, clips), plain)
    assert sizes == [7, 3] + [1] * 7
    assert scorer.batch_clips == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "goes on with 3" in caplog.messages[0]


def test_out_of_memory_with_a_single_clip_is_an_error(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_room(self: Any, part: torch.Tensor, prompts: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(VisionLanguageModel, "log_odds", without_room)
    with pytest.raises(torch.OutOfMemoryError):
        scores(HuggingFaceScorer(folders["qwen3_vl"]), some_clips(2))


def test_no_clips_have_no_scores(folders: dict[str, Path], family: str) -> None:
    assert scores(HuggingFaceScorer(folders[family]), some_clips()[:0]).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["perception_lm_pe", "smolvlm"])
def test_compiled_with_frames_encoded_once_it_is_translated_for_four_numbers_of_them(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """8, 16, 32 or 64 of a batch's different frames at once, whose last is repeated."""
    graphs = []

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noted))
    compiled = HuggingFaceScorer(folders[name], PROMPTS[0], compile=True)
    plain = HuggingFaceScorer(folders[name], PROMPTS[0], dedup=False)

    def check(different: int, clips: int) -> None:
        frames = torch.arange(different, dtype=torch.uint8)[torch.arange(clips * 24) % different]
        frames = frames.view(clips, 24, 1, 1, 1).expand(-1, -1, 3, 64, 64)
        batch = TensorDict({"clip": frames}, [clips])
        loaded(compiled).embeddings.clear()
        torch.testing.assert_close(scores(compiled, batch), scores(plain, batch), atol=1e-6, rtol=0)

    torch.compiler.reset()
    for different in (8, 16, 32, 64):
        check(different, 3)
    assert len(graphs) > 4
    before = len(graphs)
    for different, clips in ((1, 3), (7, 2), (9, 3), (20, 2), (33, 3), (65, 3), (72, 3)):
        check(different, clips)
    assert len(graphs) == before


@pytest.mark.slow
def test_compiled_model_scores_the_same(folders: dict[str, Path]) -> None:
    name, clips = "qwen3_vl", some_clips()
    plain = HuggingFaceScorer(folders[name], PROMPTS[0], dedup=False)
    compiled = HuggingFaceScorer(folders[name], PROMPTS[0], dedup=False, compile=True)
    close(scores(compiled, clips), scores(plain, clips))
    close(scores(compiled, clips[:3]), scores(plain, clips[:3]))
