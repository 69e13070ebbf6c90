"""A loaded vision-language model: clips and questions in, the odds of Yes against No out.

No family is named but where there is no common way: which of them encode frames one by one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlmrb_torchrl.scorers.embeddings import FrameEmbeddings
from vlmrb_torchrl.scorers.pretrained import answer_ids, answer_start, read_pretrained

ENCODED_ONE_BY_ONE = {"perception_lm": "video", "smolvlm": "image"}
"""Families whose frames do not see each other before the language model, and as what their
placeholder tokens are known. Qwen-VL merges two frames in one patch."""
_THOUGHTS = re.compile(r"<(\w*think\w*)>\s*$")
"""Thoughts that a template begins on the model's behalf; the last words before its turn."""


class VisionLanguageModel:
    """Processor and model of transformers, and the one way to ask them.

    B: clips, F: frames of a clip, P: prompts, S: tokens of a turn, c: of them, those before the
    first word in which the prompts differ.

    Args:
        name: Folder or hub name.
        device: Where it computes.
        dtype: Precision of the weights.
        fps: Frames per second told to the processor.
        resolution: Pixels along the edges that frames are resized to; None: as the processor does.
        answer_prefix: What the model's turn begins with; the score is read off the token after it.
        dedup: Whether equal frames are encoded once; None: where the family allows it.
        cache_megabytes: Memory for their embeddings.
        compiled: Whether ``torch.compile`` translates the model.
        options: More of ``from_pretrained``.

    Raises:
        ImportError: transformers, or a package that the model needs, is not installed.
        ValueError: It cannot load, cannot say Yes or No, cannot look at frames of ``resolution``,
            or cannot encode frames one by one although ``dedup`` is True.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        fps: float = 1.0,
        resolution: int | None = None,
        answer_prefix: str = "",
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
        compiled: bool = False,
        **options: Any,
    ) -> None:
        self.processor, self.model = read_pretrained(
            name,
            "AutoModelForImageTextToText",
            any_resolution=resolution is not None,
            dtype=dtype,
            **options,
        )
        self.model = self.model.to(device).eval().requires_grad_(False)
        _fold_batch_norms(self.model)
        self._compiled = compiled
        self._features = lambda *seen: self.model.model.get_image_features(*seen).pooler_output
        self.device, self.dtype, self.fps, self.resolution = device, dtype, fps, resolution
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answer is read off the last position
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.yes, self.no = answer_ids(tokenizer)
        self._answer = answer_start(tokenizer, answer_prefix)
        video = self.processor.video_processor
        if getattr(video, "cap_pixels_per_frame", False) is None:
            video.cap_pixels_per_frame = True  # Qwen-VL: as its authors' own reader does
        # From transformers 5.40 on, the older name would be ignored.
        self._cache = "cache" if "cache" in _arguments(self.model.forward) else "past_key_values"
        self._turns: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        family = self.model.config.model_type
        seen_as = ENCODED_ONE_BY_ONE.get(family)
        if dedup and seen_as is None:
            raise ValueError(f"dedup=True: {family} encodes no frame by itself; pass dedup=False.")
        reused = seen_as is not None and dedup is not False
        self._placeholder = getattr(self.model.config, f"{seen_as}_token_id", None)
        self.embeddings = FrameEmbeddings(self._encode, cache_megabytes) if reused else None
        if resolution is not None:
            self._try_resolution(family, resolution)
        if compiled:
            self.model.forward = torch.compile(self.model.forward, dynamic=True)
            self._features = torch.compile(self._features, dynamic=False)

    def _try_resolution(self, family: str, edge: int) -> None:
        """Look at two black frames: whether a tower takes a size, only the tower knows."""
        for name in ("image_seq_len", "image_seq_length"):  # tokens a frame, where it is a setting
            if (tokens := getattr(self.processor, name, None)) is not None:
                size = self.model.config.vision_config.image_size
                made_for = size if isinstance(size, int) else size[0]
                setattr(self.processor, name, tokens * edge**2 // made_for**2)
        black = torch.zeros(1, 2, 3, edge, edge, dtype=torch.uint8)
        try:
            self.log_odds(black, ["?"])
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"resolution={edge}: this {family} does not look at such frames ({reason}); "
                "try another multiple of its patches, or None."
            ) from error

    @torch.inference_mode()
    def log_odds(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logarithm of P(Yes) / P(No) of each clip under each prompt.

        The clips are prefilled once, with the words that all prompts begin with; each further
        word costs its own token.

        Args:
            clips: uint8 ``[B, F, 3, H, W]``.
            prompts: P questions.

        Returns:
            float32 ``[B, P]`` on the device.
        """
        if self.embeddings is None:  # else the frames that are to be encoded go there alone
            clips = self._resized(clips.to(self.device, non_blocking=True))
        if len(prompts) == 1:
            return self._answers(self._inputs(clips, prompts[0]), use_cache=False)[:, None]
        turns = [self._turn(clips, prompt)["input_ids"][0] for prompt in prompts]
        common = _common_prefix(turns)
        if any(self._sees(turn[common:]) for turn in turns):  # the clip comes after the words
            return torch.cat([self.log_odds(clips, [prompt]) for prompt in prompts], 1)
        whole = self._inputs(clips, prompts[0])
        length = len(turns[0])
        begun = {k: v[:, :common] if _along(v, length) else v for k, v in whole.items()}
        past = getattr(self._run(**begun, use_cache=True), self._cache)
        answers = []
        for turn in turns:
            words = turn[common:].expand(len(clips), -1)
            rest = {"input_ids": words, self._cache: past, **self._places(begun, words)}
            answers.append(self._answers(rest, use_cache=True))
            past.crop(common - len(turn))
        return torch.stack(answers, 1)

    def _places(self, begun: dict[str, Any], words: Tensor) -> dict[str, Tensor]:
        """Where ``words`` stand after ``begun``, in a model that counts in three dimensions.

        Left to itself, such a model goes on from the greatest place, which may be the clip's last
        second instead of the last word.
        """
        rope = getattr(self.model.model, "get_rope_index", None)
        if rope is None:
            return {}
        places, _ = rope(**{k: v for k, v in begun.items() if k in _arguments(rope)})
        further = torch.arange(1, words.shape[1] + 1, device=self.device)
        return {"position_ids": places[..., -1:] + further}

    def _answers(self, inputs: dict[str, Any], use_cache: bool) -> Tensor:
        logits = self._run(**inputs, use_cache=use_cache).logits[:, -1].float()
        odds: Tensor = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
        return odds

    def _run(self, *, frames: Tensor | None = None, **inputs: Any) -> Any:
        """One forward pass, embeddings ``frames`` ``[tokens, width]`` put in their places.

        Before transformers 5.23 the models ignore such embeddings when they are handed over.
        """
        if frames is not None:
            ids = inputs.pop("input_ids")
            words = self.model.get_input_embeddings()(ids)
            words[ids == self._placeholder] = frames.to(words.dtype)
            inputs["inputs_embeds"] = words
        # Without logits_to_keep, a row of 8,232 tokens over 128,256 words costs 4.2 GB.
        return self.model(**inputs, logits_to_keep=1)

    def _inputs(self, clips: Tensor, prompt: str) -> dict[str, Any]:
        """What `_run` reads for ``[B, F, 3, H, W]`` clips and one question."""
        if self.embeddings is None:
            return self.processed(clips, [prompt] * len(clips))
        words = {k: v.expand(len(clips), -1) for k, v in self._turn(clips, prompt).items()}
        return {**words, "frames": self.embeddings(clips.flatten(0, 1)).flatten(0, 1)}

    def _turn(self, clips: Tensor, prompt: str) -> dict[str, Tensor]:
        """Token ids of one clip and a question, ``[1, S]``; they depend on its shape alone."""
        key = (prompt, *clips.shape[1:])
        if key not in self._turns:
            turn = self.processed(self._resized(torch.zeros_like(clips[:1])), [prompt])
            self._turns[key] = {k: turn[k] for k in ("input_ids", "attention_mask")}
        return self._turns[key]

    def processed(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """What the processor makes of clips ``[B, F, 3, H, W]`` and as many questions."""
        frames, height, width = clips.shape[1], *clips.shape[-2:]
        texts = {prompt: self._text(prompt) for prompt in prompts}
        metadata = [  # one each: some processors write into it
            {
                "fps": self.fps,
                "duration": frames / self.fps,
                "total_num_frames": frames,
                "frames_indices": list(range(frames)),
                "height": height,
                "width": width,
            }
            for _ in clips
        ]
        bos = self.processor.tokenizer.bos_token
        begun = bool(bos) and all(text.startswith(bos) for text in texts.values())
        inputs = self.processor(
            text=[texts[prompt] for prompt in prompts],
            videos=[[clip] for clip in clips],
            video_metadata=metadata,
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if begun else {}),
            **self._video_options(),
        )
        return {k: self._placed(v) for k, v in inputs.items()}

    def _text(self, prompt: str) -> str:
        """A clip and ``prompt`` in the model's own form, up to where it says Yes or No.

        It is to answer without thoughts: they are turned off where the template can, and closed
        where it begins them all the same.
        """
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        known = "enable_thinking" in str(self.processor.chat_template)
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
            **({"enable_thinking": False} if known else {}),
        )
        if begun := _THOUGHTS.search(text):
            text += f"\n</{begun[1]}>\n\n"
        marks = tuple(self.processor.tokenizer.get_added_vocab())
        if self._answer and not text[-1:].isspace() and not text.endswith(marks):
            text += " "  # behind words, such as "Assistant:"
        return text + self._answer

    def _video_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "do_sample_frames": False,  # every frame handed in is looked at
            "device": str(self.device),
        }
        if self.resolution is not None:
            options["do_resize"] = False
        return options

    def _placed(self, value: Any) -> Any:
        """Move tensors to the device; floating ones to the weights' precision."""
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _resized(self, frames: Tensor) -> Tensor:
        """``[..., 3, H, W]`` to the resolution that is looked at."""
        edge = self.resolution
        if edge is None or frames.shape[-2:] == (edge, edge):
            return frames
        from torchvision.transforms.v2 import functional

        resized: Tensor = functional.resize(frames, [edge, edge], antialias=True)
        return resized

    def _encode(self, frames: Tensor) -> Tensor:
        """Embed frames ``[U, 3, H, W]`` as the model itself would, ``[U, tokens, width]``."""
        count = len(frames)
        frames = self._resized(frames.to(self.device, non_blocking=True))
        if self._compiled:  # for few sizes, since each is translated anew: 8, 16, 32, 64
            more = max(8, 1 << (count - 1).bit_length()) - count
            frames = torch.cat([frames, frames[-1:].expand(more, -1, -1, -1)])
        pixels = self.processor.video_processor(
            videos=[frames], return_tensors="pt", **self._video_options()
        )
        placed = [self._placed(v) for k, v in pixels.items() if "pixel" in k]
        encoded = self._features(*placed)
        whole: Tensor = encoded if isinstance(encoded, Tensor) else torch.cat(encoded)
        embeddings: Tensor = whole.reshape(len(frames), -1, whole.shape[-1])[:count]
        return embeddings

    def _sees(self, tokens: Tensor) -> bool:
        """Whether pictures are put in among ``tokens``."""
        names = ("image_token_id", "video_token_id")
        places = [getattr(self.model.config, name, None) for name in names]
        return any(bool((tokens == place).any()) for place in places if place is not None)


def _fold_batch_norms(model: nn.Module) -> None:
    """Put batch norms into the convolutions before them: a pass less over the pixels, same sums."""
    for chain in model.modules():
        if not isinstance(chain, nn.Sequential):
            continue
        for k, (first, second) in enumerate(pairwise(chain)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                chain[k] = nn.utils.fuse_conv_bn_eval(first, second)
                chain[k + 1] = nn.Identity()


def _arguments(function: Callable[..., Any]) -> Mapping[str, Any]:
    return inspect.signature(function).parameters


def _common_prefix(turns: Sequence[Tensor]) -> int:
    """How many tokens the turns begin with alike; at least one of each is left."""
    length = min(map(len, turns)) - 1
    same = torch.stack([turn[:length] == turns[0][:length] for turn in turns]).all(0)
    return int(same.long().cumprod(0).sum())


def _along(value: Any, length: int) -> bool:
    """Whether ``value`` is ``[B, length]``, something of every token."""
    if not isinstance(value, Tensor) or value.is_floating_point():
        return False
    return value.ndim == 2 and value.shape[1] == length
