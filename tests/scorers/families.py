"""Tiny video-language models with random weights, one of each family, saved as a user's would be.

Frames of 64 pixels, language models of width 128, some 0.3 to 1 MB each. They judge nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.benchmarks.perception_lm import SHAPES, build
from recipes.train_judge.model import PARAPHRASES, build_model, build_processor

PIXELS, PATCH = 64, 8
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(image: str, video: str) -> str:
    """A ChatML template with a family's own placeholders."""
    return TURNS.replace("IMAGE", image).replace("VIDEO", video)


def tokenizer(chat_template: str | None, named: dict[str, str], *others: str) -> Any:
    """A byte-level BPE tokenizer that knows the words of the prompts, with special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", *named.values(), *others]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512 - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["user assistant Yes No yes no YES NO Answer: Yes Answer: No"] * 20
    words += ["Yes", "No", "yes", "no", "YES", "NO"] * 20
    core.train_from_iterator([p for group in PARAPHRASES.values() for p in group] + words, trainer)
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=named,
        chat_template=chat_template,
    )


def text_config(tokens: Any) -> dict[str, Any]:
    return {
        **TEXT,
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }


def perception_lm() -> tuple[Any, Any]:
    processor = build_processor(tokens_per_side=2)
    model = build_model(processor, vision_width=32, vision_layers=1, width=32, layers=2)
    return model, processor


def perception_lm_pe() -> tuple[Any, Any]:
    """With the vision tower of the real checkpoints: PE-core, class token, rotary positions."""
    return build(SHAPES["tiny"], pixels=112)


def smolvlm() -> tuple[Any, Any]:
    from transformers import (
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMProcessor,
        SmolVLMVisionConfig,
    )
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    scale, edge = 4, {"longest_edge": PIXELS}
    tokens = tokenizer(
        None,
        {
            "image_token": "<image>",
            "video_token": "<video>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    config = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(image_size=PIXELS, **VISION),
        text_config=LlamaConfig(**text_config(tokens)),
        scale_factor=scale,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        pad_token_id=tokens.pad_token_id,
    )
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False),
        tokens,
        SmolVLMVideoProcessor(
            size=edge,
            max_image_size=edge,
            video_sampling={"max_frames": 64, "fps": 1, "video_size": edge},
        ),
        image_seq_len=(PIXELS // PATCH // scale) ** 2,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    return SmolVLMForConditionalGeneration(config), processor


def _qwen_parts(rope: dict[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    chat = template(*(f"<|vision_start|><|{k}_pad|><|vision_end|>" for k in ("image", "video")))
    tokens = tokenizer(chat, named)
    ids = {f"{k}_id": tokens.convert_tokens_to_ids(v) for k, v in named.items()}
    rope = {"rope_type": "default", "rope_theta": 1e4, **rope}
    return tokens, chat, {"text_config": {**text_config(tokens), "rope_parameters": rope}, **ids}


_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
}
_QWEN_PATCHES = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokens, chat, parts = _qwen_parts({"mrope_section": [4, 6, 6]})
    vision = {**_QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [1]}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **parts))
    size = {"shortest_edge": 16 * 16, "longest_edge": PIXELS * PIXELS}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size, **_QWEN_PATCHES),
        tokens,
        Qwen2VLVideoProcessor(size=size, **_QWEN_PATCHES),
        chat_template=chat,
    )
    return model, processor


def qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    tokens, chat, parts = _qwen_parts({"mrope_section": [6, 5, 5], "mrope_interleaved": True})
    parts["text_config"]["head_dim"] = 32
    vision = {**_QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, **parts))
    size = {"shortest_edge": 16 * 16, "longest_edge": PIXELS * PIXELS}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, **_QWEN_PATCHES),
        tokens,
        Qwen3VLVideoProcessor(
            size={k: 32 * v for k, v in size.items()},  # of a whole clip, in this family
            **_QWEN_PATCHES,
        ),
        chat_template=chat,
    )
    return model, processor


def internvl() -> tuple[Any, Any]:
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    chat = template("<IMG_CONTEXT>\n", "<video>\n")
    tokens = tokenizer(chat, named)
    vision = {**VISION, "image_size": (PIXELS, PIXELS), "patch_size": (PATCH, PATCH)}
    length = (PIXELS // PATCH) ** 2 // 4
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=Qwen2Config(**text_config(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=length,
    )
    size = {"height": PIXELS, "width": PIXELS}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokens,
        InternVLVideoProcessor(size=size),
        image_seq_length=length,
        chat_template=chat,
    )
    return InternVLForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    chat = template("<image>\n", "<video>\n")
    tokens = tokenizer(chat, {"image_token": "<image>", "video_token": "<video>"})
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=PIXELS, vision_use_head=False, **VISION),
        text_config=Qwen2Config(**text_config(tokens)),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        video_token_id=tokens.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=[[PIXELS, PIXELS]],
    )
    size = {"height": PIXELS, "width": PIXELS}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[PIXELS, PIXELS]]),
        tokens,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(PIXELS // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    build.__name__: build
    for build in (
        perception_lm,
        perception_lm_pe,
        smolvlm,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        llava_onevision,
    )
}


def save(family: str, folder: Path) -> Path:
    """Build a model of ``family`` with weights of seed 0 and write it to ``folder``."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def says(loaded: Any, first: dict[str, float], after_colon: dict[str, float]) -> None:
    """Write the next word's logits, by token, into a loaded model: after ":", and anywhere else.

    No layer adds to the token's embedding, which is one of two unit vectors; the norm makes of it
    √width times the same, and the head's column for it is the distribution.
    """
    tokenizer, model = loaded.processor.tokenizer, loaded.model
    text = getattr(model.model, "language_model", None) or model.model.text_model
    for layer in text.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings = text.embed_tokens.weight
    width = embeddings.shape[1]
    head = torch.full_like(embeddings, -50.0 / width**0.5)
    embeddings.zero_()
    embeddings[:, 0] = 1e3  # beside which the norm's epsilon is nothing
    (colon,) = tokenizer.encode(":", add_special_tokens=False)
    embeddings[colon] = embeddings[colon].roll(1)
    other = len(tokenizer) - 1  # stands for words that this tokenizer has in pieces
    for column, words in enumerate((first, after_colon)):
        for word, logit in words.items():
            pieces = tokenizer.encode(word, add_special_tokens=False)
            head[pieces[0] if len(pieces) == 1 else other, column] = logit / width**0.5
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
