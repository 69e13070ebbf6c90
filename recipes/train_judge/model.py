"""The embedded judge's parts: a tokenizer, a processor and a tiny PerceptionLM, from nothing.

Everything is made of transformers' own classes, so that the Auto classes load it back without
any code of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmrb_torchrl.prompts import DOOR, GOAL, KEY

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "goal": (
        GOAL,
        "Does this clip contain a clear instance of goal satisfaction? Answer Yes or No.",
        "Does the agent reach the green goal square in this video?",
        "Is the task completed in this clip? Answer Yes or No.",
        "Is there any frame in which the agent stands on the goal?",
    ),
    "door": (
        DOOR,
        "Does this clip contain a clear instance of a door being opened? Answer Yes or No.",
        "Does the agent open a door in this video?",
        "Is a door opened in this clip? Answer Yes or No.",
        "Is there any moment at which the agent unlocks or opens a door?",
    ),
    "key": (
        KEY,
        "Does this clip contain a clear instance of a key being picked up? Answer Yes or No.",
        "Does the agent pick up a key in this video?",
        "Is a key picked up in this clip? Answer Yes or No.",
        "Is there any moment at which the agent takes a key?",
    ),
}
"""Per event the canonical prompt first, then other ways to ask the same."""
PIXELS, PATCH = 64, 8
VOCABULARY = 512
HEADS = 4
"""Attention heads, of the language model and of the vision tower."""
BOS, EOS, PAD, IMAGE, VIDEO = (
    "<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|image|>", "<|video|>"
)  # fmt: skip
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
# PerceptionLM's own turn format: pictures first, then the words.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif c['type'] == 'video' %}{{ '<|video|>' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer whose merges are learnt from the judge's questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [BOS, EOS, PAD, IMAGE, VIDEO, HEADER, HEADER_END]
    text = [p for group in PARAPHRASES.values() for p in group]
    text += ["user assistant Yes No yes no Answer: Yes Answer: No. Yes. No."] * 20
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        padding_side="left",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokens_per_side: int = 1) -> Any:
    """The PerceptionLM processor for 64-pixel frames of ``tokens_per_side``² tokens each."""
    from transformers import PerceptionLMProcessor
    from transformers.models.perception_lm.image_processing_perception_lm import (
        PerceptionLMImageProcessor,
    )
    from transformers.models.perception_lm.video_processing_perception_lm import (
        PerceptionLMVideoProcessor,
    )

    return PerceptionLMProcessor(
        video_processor=PerceptionLMVideoProcessor(
            size={"height": PIXELS, "width": PIXELS}, do_sample_frames=False
        ),
        image_processor=PerceptionLMImageProcessor(
            tile_size=PIXELS, vision_input_type="vanilla", max_num_tiles=1
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        pooling_ratio=PIXELS // PATCH // tokens_per_side,
        chat_template=CHAT_TEMPLATE,
    )


def perception_lm(
    processor: Any, tower: str, tower_arguments: dict[str, Any], **language: Any
) -> Any:
    """A PerceptionLM with transformers' random weights.

    ``tower`` is timm's name of the vision tower, ``language`` goes to the ``LlamaConfig``.
    """
    from transformers import (
        LlamaConfig,
        PerceptionLMConfig,
        PerceptionLMForConditionalGeneration,
        TimmWrapperConfig,
    )

    tokenizer = processor.tokenizer
    config = PerceptionLMConfig(
        vision_config=TimmWrapperConfig(
            architecture=tower, do_pooling=False, model_args=tower_arguments
        ),
        text_config=LlamaConfig(
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **language,
        ),
        vision_use_cls_token=True,
        projector_pooling_ratio=processor.pooling_ratio,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        tie_word_embeddings=True,
    )
    return PerceptionLMForConditionalGeneration(config)


def build_model(
    processor: Any,
    *,
    vision_width: int = 64,
    vision_layers: int = 2,
    width: int = 128,
    layers: int = 3,
) -> Any:
    """The judge's PerceptionLM, with random weights; widths and depths are those of its two parts.

    Its vision tower is an XCiT: a convolution in every block looks at the cell's neighbours, and
    "what the agent faces" is learnt in a third of the steps that a plain ViT of this size takes.
    """
    model = perception_lm(
        processor,
        "xcit_nano_12_p8_224",
        {
            "embed_dim": vision_width,
            "depth": vision_layers,
            "num_heads": HEADS,
            "img_size": [PIXELS, PIXELS],
            "patch_size": PATCH,
            "cls_attn_layers": 0,
            "mlp_ratio": 2.0,
        },
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=len(processor.tokenizer),
        max_position_embeddings=1024,
        initializer_range=width**-0.5,
    )
    _initialise_vision(model)
    return model


@torch.no_grad()
def _initialise_vision(model: Any) -> None:
    """Weights that let a tower this narrow learn within minutes.

    transformers draws every weight with a deviation of 0.02, made for widths near a thousand: at
    64 the signal dies on the way. The projector's gain makes up for its mean over 64 cells.
    """
    tower, projector = model.model.vision_tower.timm_model, model.model.multi_modal_projector
    for name, weight in tower.named_parameters():
        if "gamma" in name:  # the residual branches' scale; XCiT starts it near 0 for deep towers
            weight.fill_(1.0)
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.xavier_uniform_(projector.linear_1.weight)
    nn.init.xavier_uniform_(projector.linear_2.weight, gain=8.0)


def normalise(frames: Tensor) -> Tensor:
    """What the video processor does to uint8 frames of 64 pixels: 0 to 255 becomes -1 to 1."""
    return frames.float().div_(127.5).sub_(1.0)


def prompt_ids(processor: Any, prompt: str, frames: int) -> Tensor:
    """Token ids of one user turn: the clip's placeholder tokens, the question, the answer's start.

    Returns:
        int64 ``[sequence]``.
    """
    content = [{"type": "video"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    per_frame = (PIXELS // PATCH // processor.pooling_ratio) ** 2
    text = text.replace(VIDEO, VIDEO * (per_frame * frames))
    return torch.tensor(processor.tokenizer.encode(text, add_special_tokens=False))
