"""Clips per second of a judge, and what its learner keeps of its speed.

    python -m recipes.benchmarks.scoring                             # the embedded judge, one core
    python -m recipes.benchmarks.scoring --model 1b --device cuda    # Perception-LM-1B's shape

The second builds a PerceptionLM of the 1B configuration with random weights: its speed is that of
the real one, its answers are noise.  Its figures are given as a share of what the GPU's peak
would allow, from the operations that the model needs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor

from recipes.benchmarks.timing import rates
from recipes.judge_model import build_processor
from vlmrb_torchrl.checks import ConfigError, require
from vlmrb_torchrl.clips import ClipRenderTransform
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.judge.collection import collect
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.scorers import EmbeddedJudge, HuggingFaceScorer

PATCH, POOL = 14, 2
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
    from transformers import (
        LlamaConfig,
        PerceptionLMConfig,
        PerceptionLMForConditionalGeneration,
        TimmWrapperConfig,
    )

    processor = build_processor()
    processor.video_processor.size = {"height": pixels, "width": pixels}
    processor.patch_size, processor.pooling_ratio = PATCH, POOL
    tokens = processor.tokenizer
    text = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        pad_token_id=tokens.pad_token_id,
    )
    config = PerceptionLMConfig(
        vision_config=TimmWrapperConfig(
            architecture="vit_pe_core_large_patch14_336",
            do_pooling=False,
            model_args=shape.tower(pixels),
        ),
        text_config=text,
        vision_use_cls_token=True,
        projector_pooling_ratio=POOL,
        image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id,
        tie_word_embeddings=True,
    )
    return PerceptionLMForConditionalGeneration(config), processor


def teraflops(shape: Shape, pixels: int, frames: int) -> tuple[float, float]:
    """Operations that a clip needs, in 10^12: of the vision tower and of the language model.

    A multiplication with its addition counts twice, as in a GPU's peak; attention is counted
    without its mask's halving.
    """
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        tower = timm.create_model(
            "vit_pe_core_large_patch14_336", num_classes=0, **shape.tower(pixels)
        )
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


def doorkey_clips(count: int, tile_size: int, window: int | None) -> Tensor:
    """Clips of DoorKey-8x8 as replay cuts them, half demonstrated, half random, ``[N, F, ...]``."""
    env = DoorKeyEnv(size=8, num_envs=16)
    settings = Settings(env, [EmbeddedJudge()], policy="mixed", clips=count)
    states = collect(settings, lambda _: None).select("render_state")
    frames: Tensor = ClipRenderTransform(env.renderer(tile_size=tile_size, window=window))(states)[
        CLIP
    ]
    return frames


def ways(scorer: HuggingFaceScorer, plain: HuggingFaceScorer, clips: Tensor, batch: int) -> Any:
    """The same clips, scored in a stream of batches: with less and less computed anew."""
    batches = [TensorDict({CLIP: part}, [len(part)]) for part in clips.split(batch)]
    scorer.load()
    plain.load()
    model = scorer._loaded
    assert model is not None
    assert model.embeddings is not None
    embeddings = model.embeddings

    def stream(judge: HuggingFaceScorer, forget: Literal["nothing", "batch", "all"]) -> int:
        if forget == "all":
            embeddings.clear()
        for part in batches:
            if forget == "batch":
                embeddings.clear()
            judge(part)
        return len(clips)

    contestants: dict[str, Callable[[], int]] = {
        "every frame": lambda: stream(plain, "nothing"),
        "equal frames of a batch once": lambda: stream(scorer, "batch"),
        "embeddings kept, from none on": lambda: stream(scorer, "all"),
        "all embeddings kept": lambda: stream(scorer, "nothing"),
    }
    return contestants


def embedded(clips: int, batch: int, rounds: int, device: str, console: Console) -> None:
    """The embedded judge on one core."""
    torch.set_num_threads(1)
    frames = doorkey_clips(clips, tile_size=8, window=8)
    distinct = len(frames.flatten(0, 1).flatten(1).unique(dim=0)) / frames.shape[:2].numel()
    contestants = ways(
        EmbeddedJudge(device=device), EmbeddedJudge(device=device, dedup=False), frames, batch
    )
    speeds = rates(contestants, rounds, seconds=0.0)
    table = Table(
        title=f"embedded judge, {clips} clips of DoorKey-8x8, 32 frames, {distinct:.0%} of them "
        f"different, batches of {batch}, {device}; median (lowest to highest) of {rounds}"
    )
    for column in ("encoded", "clips/s", "x every frame"):
        table.add_column(column)
    for name, speed in speeds.items():
        table.add_row(name, str(speed), str(speed / speeds["every frame"]))
    console.print(table)


def large(
    model: str,
    device: str,
    resolutions: tuple[int, ...],
    frames: tuple[int, ...],
    clips: int,
    batch: int,
    rounds: int,
    peak_teraflops: float,
    console: Console,
) -> None:
    """A PerceptionLM with random weights, by resolution and frames."""
    shape = SHAPES[model]
    table = Table(title=f"PerceptionLM {model}, random weights, batches of {batch}, {device}")
    columns = ("pixels", "frames", "TFLOP a clip", "clips/s", "share of peak", "deduplicated", "x")
    for column in columns:
        table.add_column(column, justify="right")
    shown = doorkey_clips(clips, tile_size=16, window=None).to(device)
    with tempfile.TemporaryDirectory() as folder:
        for part in build(shape, max(resolutions)):
            part.save_pretrained(folder)
        settings = [(pixels, count) for pixels in resolutions for count in frames]
        for pixels, count in track(settings, "settings", console=console, transient=True):
            options: dict[str, Any] = {
                "device": device,
                "dtype": "bfloat16",
                "resolution": pixels,
                "frames": count,
                "batch_clips": batch,
            }
            contestants = ways(
                HuggingFaceScorer(folder, **options),
                HuggingFaceScorer(folder, dedup=False, **options),
                shown,
                batch,
            )
            del contestants["equal frames of a batch once"], contestants["all embeddings kept"]
            speeds = rates(contestants, rounds, seconds=0.0)
            plain, kept = speeds["every frame"], speeds["embeddings kept, from none on"]
            needed = sum(teraflops(shape, pixels, count))
            share = f"{plain.median * needed / peak_teraflops:.0%}" if peak_teraflops else "-"
            table.add_row(
                str(pixels), str(count), f"{needed:.2f}", str(plain), share, str(kept),
                str(kept / plain),
            )  # fmt: skip
    console.print(table)


def main(
    model: Literal["embedded", "1b", "tiny"] = "embedded",
    device: str = "cpu",
    resolutions: tuple[int, ...] = (448, 224, 112),
    frames: tuple[int, ...] = (32, 16, 8),
    clips: int = 256,
    batch_clips: int = 16,
    rounds: int = 5,
    peak_teraflops: float = 0.0,
) -> None:
    """Clips per second of a judge, with and without encoding equal frames once.

    Args:
        model: The embedded judge, or a PerceptionLM with random weights of that size.
        device: Where it computes.
        resolutions: Of a random PerceptionLM: pixels along a frame's edge, multiples of 28.
        frames: Of a random PerceptionLM: frames of a clip.
        clips: Clips scored in each measurement.
        batch_clips: Clips of one forward pass.
        rounds: Repetitions, in turn for all, in one run.
        peak_teraflops: The device's peak in bfloat16 without sparsity (H200 and H100 SXM: 989,
            A100: 312), for the share of it that is reached; 0: not shown.
    """
    require(clips >= 1, "clips", clips, "use at least 1")
    require(rounds >= 1, "rounds", rounds, "use at least 1")
    console = Console()
    if model == "embedded":
        embedded(clips, batch_clips, rounds, device, console)
    else:
        large(
            model, device, resolutions, frames, clips, batch_clips, rounds, peak_teraflops, console
        )


if __name__ == "__main__":
    try:
        auto_cli(main)
    except ConfigError as error:
        sys.exit(f"scoring: {error}")
