"""A loaded contrastive model: clips and captions in, the cosines of their embeddings out.

No family is named but where there is no common way: how SigLIP wants its captions padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.scorers.embeddings import FrameEmbeddings
from vlmrb_torchrl.scorers.pretrained import read_pretrained

_FRAMES_AT_ONCE = 128


class ContrastiveModel:
    """Processor and model of transformers, and the one way to compare clips with captions.

    B: clips, F: frames of a clip, C: captions.

    Args:
        name: Folder or hub name.
        device: Where it computes.
        dtype: Precision of the weights.
        dedup: Whether equal frames are encoded once; None: where the family allows it.
        cache_megabytes: Memory for their embeddings.
        options: More of ``from_pretrained``.

    Attributes:
        scale: The model's own logit scale; None if it has none.

    Raises:
        ImportError: transformers, or a package that the model needs, is not installed.
        ValueError: It cannot load, embeds no captions, or sees frames only together although
            ``dedup`` is True.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
        **options: Any,
    ) -> None:
        family = _checked_family(name, options)
        self.processor, model = read_pretrained(name, "AutoModel", dtype=dtype, **options)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype
        own = getattr(model, "logit_scale", None)
        self.scale = None if own is None else float(own.float().exp())
        self._siglip = family.startswith("siglip")
        self._whole_clips = hasattr(model, "get_video_features")
        if dedup and self._whole_clips:
            raise ValueError(f"dedup=True: {family} looks at all frames together; say dedup=False.")
        reused = not self._whole_clips and dedup is not False
        self.embeddings = FrameEmbeddings(self._encode, cache_megabytes) if reused else None
        # Behind the words: that is where all of them were trained with padding.
        self.processor.tokenizer.padding_side = "right"
        self._captions: dict[tuple[str, ...], Tensor] = {}

    @torch.inference_mode()
    def cosines(self, clips: Tensor, captions: tuple[str, ...], *, mean: bool = False) -> Tensor:
        """Cosines of captions with frames, or with what stands for the clip.

        Args:
            clips: uint8 ``[B, F, 3, H, W]``.
            captions: C different ones.
            mean: Compare the mean of the frames' embeddings.

        Returns:
            float32 ``[B, F, C]``; ``[B, 1, C]`` for the mean, or a model of whole clips.

        Raises:
            ValueError: A caption has more tokens than the model reads.
        """
        if self._whole_clips:
            return self._clip_cosines(clips, captions)
        frames = clips.flatten(0, 1)
        if self.embeddings is None:
            seen = torch.cat([self._encode(part) for part in frames.split(_FRAMES_AT_ONCE)])
        else:
            seen = self.embeddings(frames)
        seen = normalize(seen, dim=-1).view(*clips.shape[:2], -1)
        if mean:
            seen = normalize(seen.mean(1, keepdim=True), dim=-1)
        if captions not in self._captions:
            said = self.model.get_text_features(**self.tokens(captions)).pooler_output
            self._captions[captions] = normalize(said.float(), dim=-1)
        return seen @ self._captions[captions].T

    def _clip_cosines(self, clips: Tensor, captions: tuple[str, ...]) -> Tensor:
        """X-CLIP's own: it adapts its captions to each clip, so both pass through it together."""
        count = self.model.config.vision_config.num_frames
        clips = clips[:, torch.from_numpy(shown_outcomes(clips.shape[1], count))]
        pixels = self._pixels(clips.flatten(0, 1))["pixel_values"]
        pixels = pixels.view(len(clips), count, *pixels.shape[-3:])
        both = self.model(pixel_values=pixels, **self.tokens(captions))
        # Its logits are these cosines, but rounded to the weights' precision after the scale.
        seen, said = (normalize(e.float(), dim=-1) for e in (both.video_embeds, both.text_embeds))
        return torch.einsum("bd,bcd->bc", seen, said)[:, None]

    def _encode(self, frames: Tensor) -> Tensor:
        """Embed frames ``[U, 3, H, W]``, float32 ``[U, width]``."""
        seen: Tensor = self.model.get_image_features(**self._pixels(frames)).pooler_output
        return seen.float()

    def _pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """What the image processor makes of frames, prepared on the device where it can."""
        prepare = self.processor.image_processor
        there = self.device if prepare.backend == "torchvision" else torch.device("cpu")
        # Said, not guessed: a frame 3 pixels wide would be taken for one with the channels last.
        inputs = prepare(
            list(frames.to(there)), input_data_format="channels_first", return_tensors="pt"
        )
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def tokens(self, captions: tuple[str, ...]) -> dict[str, Tensor]:
        """What the model reads of captions, ``[C, tokens]`` each.

        Raises:
            ValueError: A caption has more tokens than the model reads.
        """
        tokenizer = self.processor.tokenizer
        longest = self.model.config.text_config.max_position_embeddings
        for caption in captions:
            if (count := len(tokenizer(caption)["input_ids"])) > longest:
                raise ValueError(
                    f"prompt {caption!r} has {count} tokens, {self.model.config.model_type} reads "
                    f"at most {longest}: say it shorter."
                )
        # SigLIP was trained on captions padded to the end, and sees the padding: no mask.
        padding = {"padding": "max_length", "max_length": longest} if self._siglip else {}
        tokens = tokenizer(list(captions), return_tensors="pt", **{"padding": True, **padding})
        names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names}


def _checked_family(name: str, options: Mapping[str, Any]) -> str:
    """The model type at ``name``, told before its weights are read.

    Raises:
        ValueError: It embeds no captions, or neither frames nor clips.
    """
    _, config = read_pretrained(name, "AutoConfig", **options)
    from transformers import MODEL_MAPPING

    model = MODEL_MAPPING.get(type(config), None)
    sees = hasattr(model, "get_image_features") or hasattr(model, "get_video_features")
    if not (sees and hasattr(model, "get_text_features")):
        raise ValueError(
            f"{name} is a {config.model_type}, which does not embed captions and frames alike: "
            "name a CLIP, SigLIP or X-CLIP, or use HuggingFaceScorer."
        )
    return str(config.model_type)
