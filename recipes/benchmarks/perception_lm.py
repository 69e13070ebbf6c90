"""PerceptionLMs with random weights: the 1B's shape for its speed, a tiny one for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recipes.train_judge.model import build_processor, perception_lm

PATCH, POOL = 14, 2
TOWER = "vit_pe_core_large_patch14_336"
TOKENS_OF_WORDS = 40


@dataclass(frozen=True)
class Shape:
    """Widths and depths of a PerceptionLM.

    Source of the 1B: facebook/Perception-LM-1B's configuration (PE-core L/14 at 448 pixels, its
    last layer left out, and Llama 3.2 1B).
    """

    vision_width: int = 1024
    vision_layers: int = 23
    vision_heads: int = 16
    width: int = 2048
    inner_width: int = 8192
    layers: int = 16
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128_256

    def tower(self, pixels: int) -> dict[str, Any]:
        """Arguments of timm's vision tower."""
        return {
            "embed_dim": self.vision_width,
            "depth": self.vision_layers,
            "num_heads": self.vision_heads,
            "img_size": [pixels, pixels],
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": [pixels // PATCH, pixels // PATCH],
        }


SHAPES = {
    "1b": Shape(),
    "tiny": Shape(64, 2, 4, 128, 256, 2, 4, 4, 512),
}


def build(shape: Shape, pixels: int = 448) -> tuple[Any, Any]:
    """A PerceptionLM with random weights, and its processor."""
    processor = build_processor()
    processor.video_processor.size = {"height": pixels, "width": pixels}
    processor.patch_size, processor.pooling_ratio = PATCH, POOL
    model = perception_lm(
        processor,
        TOWER,
        shape.tower(pixels),
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=16_384,
    )
    return model, processor


def teraflops(shape: Shape, pixels: int, frames: int) -> tuple[float, float]:
    """Operations that a clip needs, in 10^12: of the vision tower and of the language model.

    A multiplication with its addition counts twice, as in a GPU's peak; attention is counted
    without its mask's halving.
    """
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        tower = timm.create_model(TOWER, num_classes=0, **shape.tower(pixels))
        with FlopCounterMode(display=False) as counter:
            tower.forward_features(torch.empty(1, 3, pixels, pixels))
    tokens = (pixels // PATCH // POOL) ** 2 * frames + TOKENS_OF_WORDS
    keys = shape.width * shape.key_heads // shape.heads
    weights = shape.layers * (
        2 * shape.width**2 + 2 * shape.width * keys + 3 * shape.width * shape.inner_width
    )
    attention = 2 * tokens**2 * shape.width * shape.layers
    vision: int = counter.get_total_flops()
    return frames * vision / 1e12, (2 * weights * tokens + attention) / 1e12
