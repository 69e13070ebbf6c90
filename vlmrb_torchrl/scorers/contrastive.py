"""Contrastive models as judges: does a clip look more like the goal than like the baseline?

CLIP, SigLIP and SigLIP 2 look at frame after frame, X-CLIP at the clip as a whole. They are cheap
(32 frames through a ViT-B/32: 0.3 TFLOP, at 2 a weight and token) and answer no question: they
match pictures with captions.

transformers is imported when the weights load, at the first clip, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmrb_torchrl.checks import quoted
from vlmrb_torchrl.prompts import BASELINE_CAPTION, GOAL_CAPTION
from vlmrb_torchrl.scorers.base import check_flag, check_positive
from vlmrb_torchrl.scorers.contrastive_model import ContrastiveModel
from vlmrb_torchrl.scorers.local import LocalScorer

Pooling = Literal["max", "mean"]


class ContrastiveScorer(LocalScorer):
    """How much more a clip looks like the goal's caption than like the baseline's.

    The score is sigmoid(scale · (cos(v, goal) − cos(v, baseline))) of the model's embeddings: the
    probability that a softmax over the two captions gives the goal. v is a frame, the mean of the
    frames, or, for X-CLIP, the clip. Several prompts: the maximum of their scores.

    Constructing it is cheap; weights load at the first clip (or by `load`). It pickles before
    and after: the weights stay behind and load again from where they came.

    B: clips, F: frames of a clip, P: prompts.

    Args:
        model: Folder written by ``save_pretrained`` (model and processor), or a name on the
            Hugging Face hub. Weights are read from safetensors only; remote code never runs.
        prompts: Captions of the goal, not questions; one or several.
        baseline: Caption of the same picture without the success.
        pooling: A clip's evidence among that of its frames: their "max", for a goal that shows in
            one frame, or the evidence of the "mean" of their embeddings. X-CLIP needs neither.
        scale: Factor of the difference; None: the model's own logit scale.
        device: Where the model computes, the preparation of the frames included. A GPU resizes
            them in floating point, a CPU in whole numbers: their differences of cosines are
            within 0.005 of each other in float32 (on noise, the worst of pictures), and within
            0.0001 where nothing is resized. A score moves by scale / 4 times that at most.
        dtype: Precision of the weights, as torch names it; None: bfloat16 on CUDA, else float32.
        frames: Frames looked at of each clip, spread evenly, the last among them; None: all.
            X-CLIP looks at as many of these as it was trained with.
        batch_clips: Clips of one forward pass.
        dedup: Encode equal frames once and keep their embeddings. None: where the model looks at
            one frame at a time. False: the plain path.
        cache_megabytes: Memory for the embeddings kept, least recently used dropped first.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: ``model`` is a folder that does not exist or holds no safetensors.
        ValueError: No prompt, an empty one, an unknown pooling or a number out of range.

    Source:
        CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343; X-CLIP, arXiv 2208.02816. Goal against
        baseline: after VLM-RM, arXiv 2310.12921, which projects instead of subtracting.

    Example:
        >>> scorer = ContrastiveScorer("openai/clip-vit-base-patch32", GOAL_CAPTION,
        ...                            baseline=BASELINE_CAPTION)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        prompts: str | Sequence[str] = GOAL_CAPTION,
        *,
        baseline: str = BASELINE_CAPTION,
        pooling: Pooling = "max",
        scale: float | None = None,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        frames: int | None = None,
        batch_clips: int = 64,
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
        revision: str | None = None,
    ) -> None:
        super().__init__(
            model,
            prompts,
            device=device,
            dtype=dtype,
            frames=frames,
            batch_clips=batch_clips,
            revision=revision,
        )
        check_positive("scale", scale, or_none=True)
        check_positive("cache_megabytes", cache_megabytes)
        check_flag("dedup", dedup, or_none=True)
        if not isinstance(baseline, str) or not baseline.strip():
            raise ValueError(f"baseline={quoted(baseline)}: pass captions, none of them empty.")
        self.baseline = baseline
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={quoted(pooling)}: say one of {get_args(Pooling)}.")
        self.pooling: Pooling = pooling
        self.scale = scale
        self.dedup = dedup
        self.cache_megabytes = float(cache_megabytes)

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """What the scores depend on."""
        return (
            *super().config,
            ("baseline", self.baseline),
            ("pooling", self.pooling),
            ("scale", self.scale),
        )

    def _read(self) -> ContrastiveModel:
        loaded = ContrastiveModel(
            self.model_name,
            device=self._device,
            dtype=getattr(torch, self.dtype),
            dedup=self.dedup,
            cache_megabytes=self.cache_megabytes,
            **self._pinned,
        )
        if self.scale is None and loaded.scale is None:
            raise ValueError(f"scale=None: {self.model_name} has no logit scale, pass one.")
        loaded.tokens((*self.prompts, self.baseline))  # refused now, not with the first clips
        return loaded

    def _ask(self, loaded: ContrastiveModel, clips: Tensor) -> Tensor:
        captions = tuple(dict.fromkeys((*self.prompts, self.baseline)))
        goals = [captions.index(prompt) for prompt in self.prompts]
        against = [captions.index(self.baseline)]
        scale = self.scale or loaded.scale
        assert scale is not None
        cosines = loaded.cosines(clips, captions, mean=self.pooling == "mean")
        return (scale * (cosines[..., goals] - cosines[..., against])).amax(1).sigmoid()
