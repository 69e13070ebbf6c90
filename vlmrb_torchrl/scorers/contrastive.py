"""Contrastive models as judges: does a clip look more like the goal than like the baseline?

CLIP, SigLIP and SigLIP 2 look at frame after frame, X-CLIP at the clip as a whole. They are cheap
(32 frames through a ViT-B/32: 0.3 TFLOP, at 2 a weight and token) and answer no question: they
match pictures with captions.

No family is named but where there is no common way: how SigLIP wants its captions padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmrb_torchrl.checks import is_positive, require
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.prompts import BASELINE_CAPTION, GOAL_CAPTION
from vlmrb_torchrl.scorers.local import FrameEmbeddings, Loaded, LocalScorer

Pooling = Literal["max", "mean"]
_FRAMES_AT_ONCE = 128


class ContrastiveScorer(LocalScorer):
    """How much more a clip looks like the goal's caption than like the baseline's.

    The score is sigmoid(scale · (cos(v, goal) − cos(v, baseline))) of the model's embeddings: the
    probability that a softmax over the two captions gives the goal. v is a frame, the mean of the
    frames, or, for X-CLIP, the clip. Several prompts: the maximum of their scores.

    Weights load at the first clip, or by `load`, and stay behind when it pickles.

    B: clips, F: frames of a clip, P: prompts, C: captions, that is, prompts and baseline.

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
            model, prompts, device, dtype, frames, batch_clips, dedup, cache_megabytes, revision
        )
        positive = scale is None or is_positive(scale)
        require(positive, "scale", scale, "it must be a number above 0, or None")
        said = isinstance(baseline, str) and bool(baseline.strip())
        require(said, "baseline", baseline, "pass a caption that is not empty")
        known = get_args(Pooling)
        require(pooling in list(known), "pooling", pooling, f"say one of {known}")
        self.baseline = baseline
        self.pooling: Pooling = pooling
        self.scale = scale

    @property
    def _captions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.prompts, self.baseline)))

    def _read(self) -> Loaded:
        processor, model = self._pretrained("AutoModel", self._refuse_others)
        whole_clips, family = hasattr(model, "get_video_features"), model.config.model_type
        remedy = f"{family} looks at all frames together, say dedup=False"
        require(not (self.dedup and whole_clips), "dedup", self.dedup, remedy)
        # Behind the words: that is where all of them were trained with padding.
        processor.tokenizer.padding_side = "right"
        reused = not whole_clips and self.dedup is not False
        embeddings = FrameEmbeddings(self.cache_megabytes) if reused else None
        return Loaded(processor, model, embeddings)

    def _refuse_others(self, config: Any) -> None:
        """Refuse a model that embeds no captions, or neither frames nor clips."""
        from transformers import MODEL_MAPPING

        model = MODEL_MAPPING.get(type(config), None)
        sees = hasattr(model, "get_image_features") or hasattr(model, "get_video_features")
        remedy = (
            f"it is a {config.model_type}, which does not embed captions and frames alike, name a "
            "CLIP, SigLIP or X-CLIP, or use HuggingFaceScorer"
        )
        matches = sees and hasattr(model, "get_text_features")
        require(matches, "model", self.model, remedy)

    def _try(self) -> None:
        self._tokens(self._captions)
        self._scale()

    def _scale(self) -> float:
        """The factor asked for, or the model's own."""
        if self.scale is not None:
            return self.scale
        own: Any = getattr(self._loaded.model, "logit_scale", None)
        require(own is not None, "scale", None, f"{self.model} has no logit scale, pass one")
        return float(own.float().exp())

    def _ask(self, clips: Tensor) -> Tensor:
        captions = self._captions
        goals = [captions.index(prompt) for prompt in self.prompts]
        cosines = self._cosines(clips, captions)
        against = cosines[..., [captions.index(self.baseline)]]
        return (self._scale() * (cosines[..., goals] - against)).amax(1).sigmoid()

    def _cosines(self, clips: Tensor, captions: tuple[str, ...]) -> Tensor:
        """Cosines of frames (or of their mean, or the clip: F = 1) with captions, ``[B, F, C]``."""
        loaded = self._loaded
        if hasattr(loaded.model, "get_video_features"):
            return self._clip_cosines(clips, captions)
        frames = clips.flatten(0, 1)
        if loaded.embeddings is None:
            seen = torch.cat([self._encode(part) for part in frames.split(_FRAMES_AT_ONCE)])
        else:
            seen = loaded.embeddings(frames, self._encode)
        seen = normalize(seen, dim=-1).view(*clips.shape[:2], -1)
        if self.pooling == "mean":
            seen = normalize(seen.mean(1, keepdim=True), dim=-1)
        if captions not in loaded.prepared:
            said = loaded.model.get_text_features(**self._tokens(captions)).pooler_output
            loaded.prepared[captions] = normalize(said.float(), dim=-1)
        cosines: Tensor = seen @ loaded.prepared[captions].T
        return cosines

    def _clip_cosines(self, clips: Tensor, captions: tuple[str, ...]) -> Tensor:
        """X-CLIP's own: it adapts its captions to each clip, so both pass through it together."""
        model = self._loaded.model
        count = model.config.vision_config.num_frames
        clips = clips[:, torch.from_numpy(shown_outcomes(clips.shape[1], count))]
        pixels = self._pixels(clips.flatten(0, 1))["pixel_values"]
        pixels = pixels.view(len(clips), count, *pixels.shape[-3:])
        both = model(pixel_values=pixels, **self._tokens(captions))
        # Its logits are these cosines, but rounded to the weights' precision after the scale.
        seen, said = (normalize(e.float(), dim=-1) for e in (both.video_embeds, both.text_embeds))
        return torch.einsum("bd,bcd->bc", seen, said)[:, None]

    def _encode(self, frames: Tensor) -> Tensor:
        """Embed frames ``[U, 3, H, W]``, float32 ``[U, width]``."""
        features = self._loaded.model.get_image_features(**self._pixels(frames))
        seen: Tensor = features.pooler_output
        return seen.float()

    def _pixels(self, frames: Tensor) -> dict[str, Any]:
        """What the image processor makes of frames, prepared on the device where it can."""
        prepare = self._loaded.processor.image_processor
        there = self._device if prepare.backend == "torchvision" else torch.device("cpu")
        # Said, not guessed: a frame 3 pixels wide would be taken for one with the channels last.
        inputs = prepare(
            list(frames.to(there)), input_data_format="channels_first", return_tensors="pt"
        )
        return self._placed(inputs)

    def _tokens(self, captions: tuple[str, ...]) -> dict[str, Tensor]:
        """What the model reads of captions, ``[C, tokens]`` each; refuses one that is too long."""
        tokenizer, config = self._loaded.processor.tokenizer, self._loaded.model.config
        longest = config.text_config.max_position_embeddings
        for caption in captions:
            count = len(tokenizer(caption)["input_ids"])
            remedy = (
                f"{config.model_type} reads at most {longest} tokens of its {count}, shorten it"
            )
            require(count <= longest, "prompt", caption, remedy)
        # SigLIP was trained on captions padded to the end, and sees the padding: no mask.
        names = ["input_ids", "attention_mask"]
        padding: dict[str, Any] = {"padding": True}
        if config.model_type.startswith("siglip"):
            names, padding = ["input_ids"], {"padding": "max_length", "max_length": longest}
        tokens = tokenizer(list(captions), return_tensors="pt", **padding)
        return {name: tokens[name].to(self._device) for name in names}
