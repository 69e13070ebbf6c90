"""Any video-language model of transformers as a judge: P(Yes) / (P(Yes) + P(No)) of one prefill.

One path serves every family (PerceptionLM, SmolVLM, Qwen-VL, InternVL, LLaVA-OneVision were
seen to work): the processor's chat template over a batch of clips, one forward pass, no
generation. For PerceptionLM, whose frames are encoded one by one, equal frames are encoded once
and kept; the score is the same.

transformers is imported when the weights load, at the first clip, not before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.frames import frame_digests
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.prompts import GOAL
from vlmrb_torchrl.scorers.base import PromptedScorer
from vlmrb_torchrl.scorers.pretrained import answer_ids, checked_model, read_pretrained

_FRAMES_ENCODED_AT_ONCE = 128


class HuggingFaceScorer(PromptedScorer):
    """A frozen vision-language model that answers a Yes/No question about each clip.

    The score is P(Yes) / (P(Yes) + P(No)) of the answer's first token, each summed over the
    spellings that are one token. Several prompts: the maximum of their scores, that is,
    "any of these".

    Constructing it is cheap; weights load at the first clip (or by `load`). It pickles before
    and after: the weights stay behind and load again from where they came.

    B: clips, F: frames of a clip, H, W: pixels.

    Args:
        model: Folder written by ``save_pretrained`` (model and processor), or a name on the
            Hugging Face hub. Weights are read from safetensors only; remote code never runs.
        prompts: The question, or several.
        device: Where the model computes.
        dtype: Precision of the weights, as torch names it.
        fps: Frames per second told to the model. Some families score differently under another
            value, so it belongs with the scores.
        batch_clips: Clips of one forward pass.
        dedup: Encode equal frames once and keep their embeddings. None: where the model allows
            it (PerceptionLM). False: the plain path.
        cache_megabytes: Memory for the embeddings kept, least recently used dropped first.

    Raises:
        FileNotFoundError: ``model`` is a folder that does not exist or holds no safetensors.
        ValueError: No prompt, an empty one, or a number out of range.

    Source:
        VLM-RB, arXiv 2602.01915: the score and its prompt.

    Example:
        >>> scorer = HuggingFaceScorer("facebook/Perception-LM-1B", GOAL, device="cuda:1",
        ...                            dtype="bfloat16")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        prompts: str | Sequence[str] = GOAL,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        fps: float = 1.0,
        batch_clips: int = 64,
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
    ) -> None:
        super().__init__(prompts)
        self.model_name = checked_model(model)
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r} is none of torch's: say float32 or bfloat16.")
        for name, value in (
            ("fps", fps),
            ("batch_clips", batch_clips),
            ("cache_megabytes", cache_megabytes),
        ):
            if not value > 0:
                raise ValueError(f"{name}={value}: it must be positive.")
        self.dtype = dtype
        self.fps = float(fps)
        self.batch_clips = int(batch_clips)
        self.dedup = dedup
        self.cache_megabytes = float(cache_megabytes)
        self._device = torch.device(device)
        self._loaded: _Loaded | None = None

    @classmethod
    def example(cls) -> Self:
        """The embedded judge's folder, asked the paper's prompt."""
        return cls(Path(__file__).parent / "judge")

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """What the scores depend on."""
        return (
            ("model", self.model_name),
            ("prompts", self.prompts),
            ("dtype", self.dtype),
            ("fps", self.fps),
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def load(self) -> None:
        """Read processor and weights.

        Raises:
            ImportError: transformers, or a package that the model needs, is not installed.
            OSError: The name is not on the hub, or the hub cannot be reached.
            ValueError: The tokenizer has no single token for Yes or for No, or one for both; or
                ``dedup=True`` for a family whose frames are not encoded one by one.
        """
        if self._loaded is None:
            self._loaded = _load(self)

    def score_prompts(self, tensordict: TensorDictBase) -> Tensor:
        """P(Yes) / (P(Yes) + P(No)) of each clip under each prompt, float32 ``[B, P]``."""
        self.load()
        assert self._loaded is not None
        clips = tensordict[CLIP]
        with torch.inference_mode():
            scores = [
                self._score_batch(self._loaded, part) for part in clips.split(self.batch_clips)
            ]
        return torch.cat(scores).clone() if scores else torch.zeros(0, len(self.prompts))

    def _score_batch(self, loaded: _Loaded, clips: Tensor) -> Tensor:
        embeddings = self._embeddings(loaded, clips) if loaded.dedup else None
        answers = []
        for prompt in self.prompts:
            if embeddings is None:
                inputs = self._inputs(loaded, clips, prompt)
            else:
                inputs = self._text_inputs(loaded, clips.shape, prompt)
                inputs = {k: v.expand(len(clips), -1) for k, v in inputs.items()}
                inputs["mm_encoder_outputs"] = {"video": _as_output(embeddings)}
            logits = loaded.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            answers.append(logits[:, loaded.yes].logsumexp(-1) - logits[:, loaded.no].logsumexp(-1))
        return torch.stack(answers, 1).sigmoid().cpu()

    def _inputs(self, loaded: _Loaded, clips: Tensor, prompt: str) -> dict[str, Any]:
        """What the processor makes of ``[B, F, 3, H, W]`` clips and a question."""
        B, F, _, H, W = clips.shape
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": clip}, {"type": "text", "text": prompt}],
                }
            ]
            for clip in clips
        ]
        metadata = [  # one each: some processors write into it
            {
                "fps": self.fps,
                "duration": F / self.fps,
                "total_num_frames": F,
                "frames_indices": list(range(F)),
                "height": H,
                "width": W,
            }
            for _ in range(B)
        ]
        inputs = loaded.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={
                "do_sample_frames": False,  # every frame handed in is looked at
                "video_metadata": metadata,
                "padding": True,
                "device": str(self._device),
            },
        )
        return {k: self._placed(v) for k, v in inputs.items()}

    def _placed(self, value: Any) -> Any:
        """Move tensors to the device; floating ones to the weights' precision."""
        if not isinstance(value, Tensor):
            return value
        dtype = getattr(torch, self.dtype) if value.is_floating_point() else value.dtype
        return value.to(self._device, dtype)

    def _text_inputs(self, loaded: _Loaded, shape: Sequence[int], prompt: str) -> dict[str, Tensor]:
        """Token ids of one clip's turn, ``[1, sequence]``; they depend on its shape alone."""
        key = (prompt, *shape[1:])
        if key not in loaded.text:
            blank = torch.zeros(1, *shape[1:], dtype=torch.uint8)
            inputs = self._inputs(loaded, blank, prompt)
            loaded.text[key] = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        return loaded.text[key]

    def _embeddings(self, loaded: _Loaded, clips: Tensor) -> Tensor:
        """Frame embeddings in the order of the frames, ``[B * F, tokens, width]``."""
        frames = clips.flatten(0, 1)
        digests = frame_digests(frames)
        place: dict[bytes, int] = {}
        rows = torch.tensor([place.setdefault(d, len(place)) for d in digests])
        first = {d: k for k, d in reversed(list(enumerate(digests)))}
        cache = loaded.frames
        missing = [d for d in place if d not in cache]
        for start in range(0, len(missing), _FRAMES_ENCODED_AT_ONCE):
            part = missing[start : start + _FRAMES_ENCODED_AT_ONCE]
            encoded = self._encode(loaded, frames[[first[d] for d in part]])
            # Copies: a view would keep the whole batch of embeddings in memory.
            cache.update((d, e.clone()) for d, e in zip(part, encoded, strict=True))
        distinct = []
        for digest in place:
            cache.move_to_end(digest)
            distinct.append(cache[digest])
        while len(cache) * distinct[0].nbytes > self.cache_megabytes * 1e6:
            cache.popitem(last=False)
        return torch.stack(distinct)[rows.to(self._device)]

    def _encode(self, loaded: _Loaded, frames: Tensor) -> Tensor:
        """Embed frames ``[U, 3, H, W]`` as the model itself would, ``[U, tokens, width]``."""
        inputs = loaded.processor.video_processor(
            videos=[frames],
            do_sample_frames=False,
            return_tensors="pt",
            device=str(self._device),
        )
        pixels = self._placed(inputs["pixel_values_videos"])
        encoded: Tensor = loaded.model.model.get_image_features(pixels).pooler_output
        return encoded


@dataclass
class _Loaded:
    """What `HuggingFaceScorer.load` read, and what it keeps between batches.

    Held in a plain object: as a submodule the weights would enter every checkpoint.
    """

    model: Any
    processor: Any
    yes: list[int]
    no: list[int]
    dedup: bool
    text: dict[tuple[Any, ...], dict[str, Tensor]] = field(default_factory=dict)
    frames: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict)


def _load(scorer: HuggingFaceScorer) -> _Loaded:
    processor, model = read_pretrained(scorer.model_name, getattr(torch, scorer.dtype))
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # the answer is read off the last position
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    family = model.config.model_type
    if scorer.dedup and family != "perception_lm":
        raise ValueError(f"dedup=True needs a PerceptionLM, this is {family}: pass dedup=False.")
    yes, no = answer_ids(tokenizer)
    model = model.to(scorer.device).eval().requires_grad_(False)
    dedup = family == "perception_lm" and scorer.dedup is not False
    return _Loaded(model, processor, yes, no, dedup)


def _as_output(embeddings: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=embeddings)
