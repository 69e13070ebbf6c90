"""One path for every family, on tiny models of random weights: only arithmetic is tested.

Of the families, one whose frames are encoded one by one and one that counts in three dimensions
are tested every time, the others by the slow tests.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional

from recipes.train_judge.model import build_tokenizer
from tests.scorers.distributions import DISTRIBUTIONS
from tests.scorers.families import FAMILIES, save, says
from vlmrb_torchrl.scorers import HuggingFaceScorer, local
from vlmrb_torchrl.scorers.huggingface import ENCODED_ONE_BY_ONE, _filled, answer_ids, answer_start

PROMPTS = (
    "Is the goal reached in this clip? Answer Yes or No.",
    "Is the goal a key?",
    "Does the agent open a door in this clip anywhere? Answer Yes or No.",
)
FAST = ("perception_lm", "qwen3_vl")
REUSING = ("perception_lm", "perception_lm_pe", "smolvlm")
OBEDIENT = {"Answer": math.log(0.9), "Yes": math.log(0.02), "No": math.log(0.08)}
"""What it says first, asked to "Output exactly Answer: Yes": read there, the score would be 0.2."""

Shared = Callable[..., HuggingFaceScorer]


def slow_but(fast: tuple[str, ...], *rows: Any) -> list[Any]:
    """The rows; those of a family that is not among ``fast`` are slow."""
    families = [row[0] if isinstance(row, tuple) else row for row in rows]
    return [
        row
        if family in fast
        else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
        for row, family in zip(rows, families, strict=True)
    ]


each_family = pytest.mark.parametrize("family", slow_but(FAST, *FAMILIES))
WAYS = [(f, dedup) for f in FAMILIES for dedup in ((None, False) if f in REUSING else (None,))]
each_way = pytest.mark.parametrize(("family", "dedup"), slow_but(FAST, *WAYS))


@pytest.fixture(scope="session")
def shared(folder_of: Callable[[str], Path]) -> Shared:
    """A loaded judge, asked the first prompt, that no test may change."""

    @functools.cache
    def load(family: str, **options: Any) -> HuggingFaceScorer:
        scorer = HuggingFaceScorer(folder_of(family), PROMPTS[0], **options)
        scorer.load()
        return scorer

    return load


def some_clips(count: int = 4, frames: int = 6) -> TensorDict:
    """Frames repeat, within a clip and across clips."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, 7, (count, frames), generator=generator)
    return TensorDict({"clip": pool[rows]}, [count])


def different(clips: TensorDict) -> int:
    return len(clips["clip"].flatten(0, 1).flatten(1).unique(dim=0))


def scores(scorer: HuggingFaceScorer, clips: TensorDict) -> torch.Tensor:
    return scorer(clips.clone())["score"]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- which clip, which prompt


@each_way
def test_clip_scores_the_same_alone_in_a_batch_and_in_any_order(
    shared: Shared, family: str, dedup: bool | None
) -> None:
    scorer, clips = shared(family, dedup=dedup).asking(PROMPTS[0]), some_clips()
    whole = scores(scorer, clips)
    assert whole.unique().numel() == 4  # it looks at them
    close(torch.cat([scores(scorer, clips[k : k + 1]) for k in range(4)]), whole)
    close(scores(scorer, clips[[2, 0, 3, 1]]), whole[[2, 0, 3, 1]])
    scorer.batch_clips = 3
    close(scores(scorer, clips), whole)
    assert scores(scorer, clips[:0]).shape == (0,)


@each_family
def test_short_clip_filled_up_with_its_last_frame_scores_the_same_beside_longer_ones(
    shared: Shared, family: str
) -> None:
    """Clips of unequal length reach a scorer as replay cuts them: the last frame repeated."""
    clips = some_clips()
    clips["clip"][1, 3:] = clips["clip"][1, 2]
    close(scores(shared(family), clips)[1:2], scores(shared(family), clips[1:2]))


@each_family
def test_all_frames_are_looked_at_in_their_order(shared: Shared, family: str) -> None:
    """No processor samples on its own: clips that differ in one frame score differently.

    At 8 frames per second, of which some would sample 2.
    """
    clips = some_clips(1, 6)["clip"].repeat(7, 1, 1, 1, 1)
    for k in range(6):
        clips[k, k] = 255 - clips[k, k]
    clips[6] = clips[6].flip(0)
    scorer = shared(family, fps=8.0)
    assert scores(scorer, TensorDict({"clip": clips}, [7])).unique().numel() == 7


@each_family
def test_subsampled_clip_scores_as_the_clip_of_those_frames(shared: Shared, family: str) -> None:
    """3 of 6 frames: the second, fourth and sixth."""
    clips, subsampled = some_clips(), shared(family).asking(PROMPTS[0])
    fewer = TensorDict({"clip": clips["clip"][:, [1, 3, 5]]}, clips.batch_size)
    subsampled.frames = 3
    close(scores(subsampled, clips), scores(shared(family), fewer))


@each_family
def test_turns_of_unequal_length_in_a_batch_are_padded_on_the_left(
    shared: Shared, family: str
) -> None:
    """Padded on the right, the last position of the shorter turn would be no answer."""
    scorer, frames = shared(family, dedup=False), some_clips()["clip"][:2]
    with torch.inference_mode():
        together = scorer._odds(scorer._run(**scorer._processed(frames, PROMPTS[:2])))
        for k in range(2):
            one = scorer._processed(frames[k : k + 1], [PROMPTS[k]])
            close(together[k : k + 1], scorer._odds(scorer._run(**one)))


@pytest.mark.parametrize("family", slow_but((*FAST, "internvl"), *FAMILIES))
def test_words_are_read_once_and_what_the_model_reads_is_its_processors(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """InternVL's processor renames what its video processor makes: each batch goes through it."""
    scorer, clips, asked = shared(family, dedup=False), some_clips()["clip"], []
    expected = scorer._processed(clips, ["Is it?"] * 4)
    assert expected.pop("attention_mask").all()
    real = HuggingFaceScorer._processed

    def noted(self: Any, clips: torch.Tensor, prompts: Any) -> Any:
        asked.append(len(clips))
        return real(self, clips, prompts)

    monkeypatch.setattr(HuggingFaceScorer, "_processed", noted)
    for _ in range(2):
        found = scorer._inputs(clips, "Is it?")
        found.pop("attention_mask", None)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert asked == ([1, 4, 4] if family == "internvl" else [1])


@each_family
def test_the_score_is_read_where_an_obedient_model_answers(
    folder_of: Callable[[str], Path], family: str
) -> None:
    clips, scorer = some_clips(1), HuggingFaceScorer(folder_of(family), PROMPTS[0])
    scorer.load()
    for name, (answer, score) in DISTRIBUTIONS.items():
        if name == "every spelling" and family.startswith("perception_lm"):
            continue  # to its tokenizer, YES is three tokens
        says(scorer._loaded, OBEDIENT, answer)
        close(scores(scorer, clips), torch.tensor([score]))
    close(scores(scorer.asking(PROMPTS), clips), torch.tensor([score]))
    if family != "smolvlm":  # whose turn begins after "Assistant:", another colon
        scorer._answer = ""
        scorer._loaded.prepared.clear()
        close(scores(scorer, clips), torch.tensor([0.2]))


@pytest.mark.parametrize(
    ("family", "opening", "ending"),
    slow_but(
        FAST,
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
    ),
)
def test_the_turn_ends_in_the_prefix_and_without_thoughts(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, family: str, opening: str, ending: str
) -> None:
    scorer = shared(family)
    processor = scorer._loaded.processor
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + opening)
    assert scorer._text(PROMPTS[0]).endswith(ending)
    ids = scorer._processed(some_clips(1)["clip"], [PROMPTS[0]])["input_ids"][0]
    assert processor.tokenizer.decode(ids).endswith(ending)


@pytest.mark.filterwarnings("error::FutureWarning")  # of arguments that will be ignored one day
@pytest.mark.parametrize(("family", "dedup"), slow_but((*FAST, "qwen2_5_vl"), *WAYS))
def test_each_of_several_prompts_scores_as_if_asked_alone(
    shared: Shared, family: str, dedup: bool | None
) -> None:
    """To Qwen2.5-VL, the greatest place so far is no word's: the clip ends later."""
    scorer, clips = shared(family, dedup=dedup), some_clips()
    together = scorer.asking(PROMPTS).score_prompts(clips)
    alone = torch.stack([scores(scorer.asking(prompt), clips) for prompt in PROMPTS], 1)
    close(together, alone)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-6)
    close(scores(scorer.asking(PROMPTS), clips), alone.amax(1))


@each_family
def test_a_further_prompt_costs_its_own_tokens(shared: Shared, family: str) -> None:
    """The language model reads one turn and, of the others, what differs from it."""
    scorer, clips, read = shared(family, dedup=False), some_clips(), []
    text = scorer._loaded.model.model
    text = getattr(text, "language_model", None) or text.text_model
    handle = text.register_forward_hook(
        lambda module, _, output: read.append(output.last_hidden_state.shape[1])
    )
    scorer.asking(PROMPTS).score_prompts(clips)
    handle.remove()
    turns = [scorer._turn(clips["clip"], prompt).words["input_ids"].shape[1] for prompt in PROMPTS]
    begun = read[0]
    assert read[1:] == [turn - begun for turn in turns]
    assert begun > 0.5 * min(turns)


# ---------------------------------------------------------------- frames encoded once


@pytest.mark.parametrize("family", slow_but(FAST, *REUSING))
def test_reused_frame_embeddings_change_no_score(
    shared: Shared, folder_of: Callable[[str], Path], family: str
) -> None:
    clips, reused = some_clips(), HuggingFaceScorer(folder_of(family), PROMPTS[0])
    plain = scores(shared(family, dedup=False), clips)
    close(scores(reused, clips), plain)
    embeddings = reused._loaded.embeddings
    close(scores(reused, clips), plain)  # now every frame comes from the cache
    assert embeddings.encoded == different(clips)
    small = HuggingFaceScorer(folder_of(family), PROMPTS[0], cache_megabytes=0.0005)
    close(scores(small, clips), plain)
    assert sum(e.nbytes for e in small._loaded.embeddings._kept.values()) <= 500


@pytest.mark.parametrize(
    ("family", "edge"), slow_but(("perception_lm_pe",), ("perception_lm_pe", 112), ("smolvlm", 32))
)
def test_frames_are_compared_as_drawn_and_each_different_one_is_resized_once(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, family: str, edge: int
) -> None:
    events, clips = [], some_clips()
    digest, resize = local.frame_digests, functional.resize

    def noted_digest(frames: torch.Tensor) -> list[bytes]:
        events.append(("digest", len(frames), frames.shape[-1]))
        return digest(frames)

    def noted_resize(frames: torch.Tensor, size: list[int], **options: Any) -> torch.Tensor:
        events.append(("resize", len(frames), frames.shape[-1]))
        return resize(frames, size, **options)

    scorer = shared(family, resolution=edge)
    reference = scores(shared(family, resolution=edge, dedup=False), clips)
    scorer._turn(clips["clip"], PROMPTS[0])  # resizes a black clip, to count its tokens
    monkeypatch.setattr(local, "frame_digests", noted_digest)
    monkeypatch.setattr(functional, "resize", noted_resize)
    torch.testing.assert_close(scores(scorer, clips), reference, atol=1e-6, rtol=0)
    assert events == [("digest", 24, 64), ("resize", different(clips), 64)]


@pytest.mark.parametrize("family", slow_but(FAST, "perception_lm", "smolvlm"))
def test_frames_are_seen_by_a_model_that_takes_no_embeddings_of_them(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As before transformers 5.23, whose models ignore the argument without a word."""
    model, clips = shared(family)._loaded.model, some_clips()
    real = model.forward

    def forward(*, mm_encoder_outputs: Any = None, **inputs: Any) -> Any:
        return real(**inputs)

    monkeypatch.setattr(model, "forward", forward)
    close(scores(shared(family), clips), scores(shared(family, dedup=False), clips))


@each_family
def test_frames_are_reused_by_default_just_where_they_are_encoded_one_by_one(
    shared: Shared, family: str
) -> None:
    loaded = shared(family)._loaded
    assert (loaded.embeddings is not None) == (family in REUSING)
    assert (family in REUSING) == (loaded.model.config.model_type in ENCODED_ONE_BY_ONE)


def test_dedup_is_refused_where_frames_are_encoded_together(
    folder_of: Callable[[str], Path],
) -> None:
    with pytest.raises(ValueError, match="encodes no frame by itself, pass dedup=False"):
        HuggingFaceScorer(folder_of("qwen3_vl"), dedup=True).load()


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("family", slow_but(("qwen3_vl",), *FAMILIES))
def test_attention_and_precision_change_little(shared: Shared, family: str) -> None:
    clips = some_clips()
    full = scores(shared(family), clips)
    eager = shared(family, attention="eager")
    close(scores(eager, clips), scores(shared(family, attention="sdpa"), clips))
    assert eager._loaded.model.config._attn_implementation == "eager"
    low = scores(shared(family, dtype="bfloat16"), clips)
    torch.testing.assert_close(low, full, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("family", "edge", "per_frame"),
    slow_but(
        FAST,
        ("perception_lm_pe", 56, 4),  # patches of 14, pooled 2x2
        ("smolvlm", 32, 1),  # patches of 8, shuffled 4x4
        ("qwen2_5_vl", 32, 2),  # patches of 8, merged 2x2, two frames in one
        ("qwen3_vl", 32, 2),
        ("internvl", 32, 4),
    ),
)
def test_resolution_changes_the_tokens_of_a_frame(
    shared: Shared, family: str, edge: int, per_frame: int
) -> None:
    """Picture tokens of a clip of 6 frames, from the family's patches and poolings."""
    scorer = shared(family, resolution=edge)
    assert scores(scorer, some_clips()).unique().numel() == 4
    ids = scorer._turn(torch.zeros(1, 6, 3, edge, edge, dtype=torch.uint8), "?").words["input_ids"]
    config = scorer._loaded.model.config
    places = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    assert sum(int((ids == place).sum()) for place in places if place is not None) == 6 * per_frame


def test_a_resized_tower_sees_as_one_of_any_size_and_in_its_own_precision(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """timm's ``dynamic_img_size`` would make the rotary embedding, and what it touches, float32."""
    any_size = shutil.copytree(folder_of("perception_lm_pe"), tmp_path / "model")
    config = json.loads((any_size / "config.json").read_text())
    config["vision_config"]["model_args"]["dynamic_img_size"] = True
    (any_size / "config.json").write_text(json.dumps(config))
    frames = torch.rand(1, 2, 3, 56, 56)

    class Dtypes(TorchDispatchMode):
        """Precisions of what is computed of the frames; a rotary embedding is of no batch."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 3:
                met.add(out.dtype)
            return out

    for dtype in ("float32", "bfloat16"):
        seen = []
        for folder in (folder_of("perception_lm_pe"), any_size):
            scorer, met = HuggingFaceScorer(folder, resolution=56, dtype=dtype), set()
            scorer.load()
            with torch.inference_mode(), Dtypes():
                model = scorer._loaded.model
                seen.append(model.model.get_image_features(frames.to(model.dtype)).pooler_output)
            if folder != any_size:
                assert met == {model.dtype}
        if dtype == "float32":
            assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("family", "edge"), slow_but(FAST, ("llava_onevision", 32), ("smolvlm", 56), ("qwen3_vl", 60))
)
def test_resolution_that_a_model_cannot_look_at_is_refused_when_it_loads(
    folder_of: Callable[[str], Path], family: str, edge: int
) -> None:
    scorer = HuggingFaceScorer(folder_of(family), resolution=edge)
    for _ in range(2):  # nothing half loaded is left
        with pytest.raises(ValueError, match=f"resolution is {edge}: this {family} does") as error:
            scorer.load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", slow_but(FAST, "smolvlm", "qwen2_5_vl", "qwen3_vl"))
def test_frames_per_second_reach_the_models_that_are_told_the_time(
    shared: Shared, family: str
) -> None:
    slow, fast = (shared(family, fps=fps) for fps in (0.25, 8.0))
    assert not torch.allclose(scores(slow, some_clips()), scores(fast, some_clips()), atol=1e-6)
    assert slow.fingerprint != fast.fingerprint


def test_out_of_memory_halves_the_batch_and_goes_on(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for two: 7 clips at once fail, so do 3 (7 // 2), and 1 (3 // 2) goes through."""
    caplog.set_level(logging.WARNING)
    clips, scorer, sizes, room = some_clips(7), shared("qwen3_vl").asking(PROMPTS[0]), [], 2
    plain, real = scores(scorer, clips), HuggingFaceScorer.log_odds

    def with_room(self: Any, part: torch.Tensor, prompts: Any) -> torch.Tensor:
        sizes.append(len(part))
        if len(part) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, part, prompts)

    monkeypatch.setattr(HuggingFaceScorer, "log_odds", with_room)
    close(scores(scorer, clips), plain)
    assert sizes == [7, 3] + [1] * 7
    assert scorer.batch_clips == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "goes on with 3" in caplog.messages[0]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):  # with a single clip it is an error
        scores(scorer, clips[:2])


@pytest.mark.parametrize(
    ("most", "sizes"), [(64, {8, 16, 32, 64}), (6, {1, 2, 3, 6}), (1, {1})], ids=str
)
def test_a_batch_is_filled_up_to_one_of_four_sizes_by_its_last_row(
    most: int, sizes: set[int]
) -> None:
    """An eighth, a quarter, half or all of the greatest, rounded up."""
    rows, found = torch.arange(most), set()
    for count in range(1, most + 1):
        filled = _filled(rows[:count], most)
        found.add(len(filled))
        assert len(filled) < 2 * count or len(filled) == min(sizes)
        assert filled.tolist() == [min(row, count - 1) for row in range(len(filled))]
    assert found == sizes


@pytest.mark.parametrize("dedup", [None, False])
def test_clips_that_fill_a_batch_up_change_no_score(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, dedup: bool | None
) -> None:
    """Compiled or not: here it only pretends to be."""
    scorer, clips = shared("perception_lm", dedup=dedup).asking(PROMPTS), some_clips(5)
    plain = scores(scorer, clips)
    scorer._compile, scorer.batch_clips, seen = True, 4, []
    real = HuggingFaceScorer.log_odds

    def noted(self: Any, part: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append(len(part))
        return real(self, part, prompts)

    monkeypatch.setattr(HuggingFaceScorer, "log_odds", noted)
    close(scores(scorer, clips), plain)
    close(scores(scorer, clips[:3]), plain[:3])
    assert seen == [4, 1, 4]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["perception_lm_pe", "smolvlm"])
def test_compiled_it_is_translated_for_four_numbers_of_frames_and_of_clips(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """8, 16, 32 or 64 of a batch's different frames at once, and 1, 2 or 4 clips (4, 2, 1, ½)."""
    graphs = []

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=noted))
    compiled = HuggingFaceScorer(folder_of(family), PROMPTS[0], compile=True, batch_clips=4)
    plain = HuggingFaceScorer(folder_of(family), PROMPTS[0], dedup=False)
    compiled.load()

    def check(different: int, clips: int) -> None:
        frames = torch.arange(different, dtype=torch.uint8)[torch.arange(clips * 24) % different]
        frames = frames.view(clips, 24, 1, 1, 1).expand(-1, -1, 3, 64, 64)
        batch = TensorDict({"clip": frames}, [clips])
        compiled._loaded.embeddings.clear()
        torch.testing.assert_close(scores(compiled, batch), scores(plain, batch), atol=1e-6, rtol=0)

    torch.compiler.reset()
    for number, clips in ((8, 3), (16, 3), (32, 3), (64, 3), (1, 1), (1, 2)):
        check(number, clips)
    assert len(graphs) > 6
    before = len(graphs)
    for number, clips in ((1, 4), (7, 2), (9, 5), (20, 2), (33, 3), (65, 3), (72, 3), (9, 1)):
        check(number, clips)
    assert len(graphs) == before


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dedup"), [("qwen3_vl", False), ("perception_lm_pe", None)])
def test_compiled_model_scores_the_same(shared: Shared, family: str, dedup: bool | None) -> None:
    plain, clips = shared(family, dedup=False).asking(PROMPTS), some_clips()
    compiled = shared(family, dedup=dedup, compile=True).asking(PROMPTS)
    close(scores(compiled, clips), scores(plain, clips))
    close(scores(compiled, clips[:3]), scores(plain, clips[:3]))


# ---------------------------------------------------------------- Yes and No to a tokenizer


class Tokenizer:
    """Makes a token of every piece that a pattern finds; without one, of anything the same."""

    def __init__(self, pattern: str = "") -> None:
        self.pattern = pattern

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int.from_bytes(p.encode()) for p in re.findall(self.pattern, text)[: len(text)]]

    def decode(self, ids: list[int]) -> str:
        return "".join(i.to_bytes(9).decode().strip("\0") for i in ids) or "?"


def test_answer_tokens_are_whole_words() -> None:
    tokenizer = build_tokenizer()
    for ids, word in zip(answer_ids(tokenizer), ("yes", "no"), strict=True):
        assert {tokenizer.decode([i]).strip().lower() for i in ids} == {word}


def test_a_tokenizer_that_cannot_tell_yes_from_no_is_refused() -> None:
    with pytest.raises(ValueError, match="mean Yes and No alike"):
        answer_ids(Tokenizer(r"$"))  # knows no words: everything is its one unknown token
    with pytest.raises(ValueError, match="no single token for 'Yes'"):
        answer_ids(Tokenizer("."))


def test_a_space_of_its_own_before_the_answer_is_part_of_the_prefix() -> None:
    """Else the model would say that space next, and Yes and No only after it."""
    assert answer_start(Tokenizer(r"\w+|\W"), "Answer:") == "Answer: "
    assert answer_start(build_tokenizer(), "Answer:") == "Answer:"
    assert answer_start(Tokenizer(r"\w+|\W"), "") == ""


# ---------------------------------------------------------------- what is loaded, what is refused


def test_scorer_pickles_small_before_and_after_it_loaded(
    shared: Shared, folder_of: Callable[[str], Path]
) -> None:
    scorer, clips = HuggingFaceScorer(folder_of("perception_lm"), PROMPTS[0]), some_clips()
    expected = scores(shared("perception_lm"), clips)
    for judge in (scorer, shared("perception_lm")):
        assert len(pickle.dumps(judge)) < 4000
        close(scores(pickle.loads(pickle.dumps(judge)), clips), expected)
    assert not shared("perception_lm").state_dict()  # weights stay out of checkpoints


# A fresh interpreter in which one package seems not to be installed: transformers looks once.
WITHOUT = """
import importlib.metadata, importlib.util, sys
hidden, folder = sys.argv[1:]
find, version = importlib.util.find_spec, importlib.metadata.version
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.util.find_spec = lambda n, *a: None if n.split(".")[0] == hidden else find(n, *a)
importlib.metadata.version = lambda n: missing(n) if n == hidden else version(n)
sys.modules[hidden] = None
from vlmrb_torchrl.scorers import HuggingFaceScorer
try:
    HuggingFaceScorer(folder).load()
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "family"),
    [("torchvision", "qwen3_vl"), ("timm", "perception_lm"), ("num2words", "smolvlm")],
)
def test_missing_package_of_a_family_is_named_with_the_remedy(
    folder_of: Callable[[str], Path], package: str, family: str
) -> None:
    command = [sys.executable, "-c", WITHOUT, package, str(folder_of(family))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert package in line.lower()
    assert "pip install 'vlmrb-torchrl[vlm]'" in line


def test_missing_package_is_named_in_one_line_with_the_remedy(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ImportError, match="pip install flash-attn, or attention='sdpa'"):
            HuggingFaceScorer(folder_of("qwen3_vl"), attention="flash_attention_2").load()
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"cannot load .*transformers.*: pip install .*'vlmrb-torchrl\[vlm\]'"
    with pytest.raises(ImportError, match=message) as error:
        HuggingFaceScorer(folder_of("qwen3_vl")).load()
    assert "\n" not in str(error.value)


def test_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors.*save_pretrained"):
        HuggingFaceScorer(tmp_path)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)


def test_pickle_beside_safetensors_is_not_opened(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    mark, folder = tmp_path / "opened", shutil.copytree(folder_of("qwen3_vl"), tmp_path / "model")
    torch.save({"weight": Bomb(str(mark))}, folder / "pytorch_model.bin")
    HuggingFaceScorer(folder).load()
    assert not mark.exists()


def test_code_that_comes_with_a_model_does_not_run(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    mark, folder = tmp_path / "ran", shutil.copytree(folder_of("qwen3_vl"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ValueError, match="custom code"):
        HuggingFaceScorer(folder).load()
    assert not mark.exists()
    with pytest.warns(UserWarning, match="will run with your rights; read it, and pin it"):
        HuggingFaceScorer(folder, trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HuggingFaceScorer(folder)


def test_folder_without_a_processor_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save("qwen3_vl", tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="save both with save_pretrained") as error:
        HuggingFaceScorer(folder).load()
    assert "\n" not in str(error.value)
