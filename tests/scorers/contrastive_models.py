"""Contrastive models with random weights, small enough for a test, in folders as the hub has them.

``FAMILIES`` maps a family's name to the function that writes its folder. Below them are clips, and
scorers that compare ``GOAL`` with ``BASELINE``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from vlmrb_torchrl.scorers import ContrastiveScorer

GOAL = "a red triangle on a green square"
BASELINE = "a red triangle"
PIXELS = 32
PATCH = 16
PATCHES = (PIXELS // PATCH) ** 2
WIDTH = 32
X_CLIP_FRAMES = 4
TEXT_TOKENS = 64


def build_tokenizer() -> Any:
    """One token per byte, then the end of text, which these models read a prompt off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: k for k, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    core.add_special_tokens([end])
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, core.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        **_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_TOKENS,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


_LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_SQUARE = {"height": PIXELS, "width": PIXELS}
_VISION = {**_LAYERS, "image_size": PIXELS, "patch_size": PATCH}


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = build_tokenizer()
    config = CLIPConfig(text_config=_text(tokenizer), vision_config=_VISION, projection_dim=WIDTH)
    pixels = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=_SQUARE)
    return _save(folder, CLIPModel(config), CLIPProcessor(pixels, tokenizer))


def siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    tokenizer = build_tokenizer()
    text = {**_text(tokenizer), "projection_size": WIDTH}
    pixels = SiglipImageProcessor(size=_SQUARE)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    return _save(folder, model, SiglipProcessor(pixels, tokenizer))


def siglip2(folder: Path) -> Path:
    """The variant of any aspect ratio; the others are plain SigLIP models."""
    from transformers import (
        Siglip2Config,
        Siglip2ImageProcessor,
        Siglip2Model,
        Siglip2Processor,
        Siglip2Tokenizer,
    )

    # Reloading rebuilds this family's own tokenizer, one that falls back to bytes.
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = Siglip2Tokenizer(vocabulary, padding_side="right")  # as on the hub
    text = {**_text(tokenizer), "projection_size": WIDTH}
    vision = {**_LAYERS, "patch_size": PATCH, "num_patches": PATCHES}
    pixels = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=PATCHES)
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    return _save(folder, model, Siglip2Processor(pixels, tokenizer))


def x_clip(folder: Path) -> Path:
    from transformers import VideoMAEImageProcessor, XCLIPConfig, XCLIPModel, XCLIPProcessor

    tokenizer = build_tokenizer()
    vision = {
        **_VISION,
        "num_frames": X_CLIP_FRAMES,
        "mit_hidden_size": WIDTH,
        "mit_intermediate_size": 2 * WIDTH,
        "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2,
    }
    config = XCLIPConfig(
        text_config=_text(tokenizer),
        vision_config=vision,
        projection_dim=WIDTH,
        prompt_layers=1,
        prompt_num_attention_heads=2,
    )
    # The published ones come with this processor, which takes all frames for one video.
    pixels = VideoMAEImageProcessor(size={"shortest_edge": PIXELS}, crop_size=_SQUARE)
    return _save(folder, XCLIPModel(config), XCLIPProcessor(pixels, tokenizer))


@torch.no_grad()
def _save(folder: Path, model: Any, processor: Any) -> Path:
    """Draw the weights and write the folder.

    transformers draws them with a deviation of 0.02, made for widths near a thousand: at this
    width all clips would score alike.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or "embedding" in name:
            weight.normal_(0.0, WIDTH**-0.5, generator=generator)
        elif "logit_scale" in name:
            weight.fill_(2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "x_clip": x_clip,
}


def model_and_processor(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    return AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def some_clips(count: int = 5, frames: int = 6) -> Tensor:
    """Clips whose frames repeat, within a clip and across clips, and are no squares."""
    generator = torch.Generator().manual_seed(1)
    shape = (7, 3, 2 * PIXELS, 2 * PIXELS)
    pool = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pool[torch.randint(0, 7, (count, frames), generator=generator)]


def scorer_of(folder: Path, prompts: Any = GOAL, **arguments: Any) -> ContrastiveScorer:
    return ContrastiveScorer(folder, prompts, baseline=BASELINE, **arguments)


def scores(scorer: ContrastiveScorer, clips: Tensor) -> Tensor:
    return scorer(TensorDict({"clip": clips}, [len(clips)]))["score"]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
