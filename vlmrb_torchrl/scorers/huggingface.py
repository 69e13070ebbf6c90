"""Any video-language model of transformers as a judge: P(Yes) / (P(Yes) + P(No)) of one prefill.

One path serves every family (PerceptionLM, SmolVLM, Qwen2.5-VL, Qwen3-VL, InternVL and
LLaVA-OneVision are tested): the processor's chat template over a batch of clips, one forward
pass, no generation. Where frames are encoded one by one (PerceptionLM, SmolVLM), equal frames are
encoded once and kept; the score is the same.

No family is named but where there is no common way: which of them encode frames one by one.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vlmrb_torchrl.checks import is_positive, is_whole, require
from vlmrb_torchrl.prompts import GOAL
from vlmrb_torchrl.scorers.answers import NO_WORDS, YES_WORDS
from vlmrb_torchrl.scorers.local import FRAMES_AT_ONCE, FrameEmbeddings, Loaded, LocalScorer

Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]
ENCODED_ONE_BY_ONE = {"perception_lm": "video", "smolvlm": "image"}
"""Families whose frames do not see each other before the language model, and as what their
placeholder tokens are known. Qwen-VL merges two frames in one patch."""
_THOUGHTS = re.compile(r"<(\w*think\w*)>\s*$")
"""Thoughts that a template begins on the model's behalf; the last words before its turn."""


class HuggingFaceScorer(LocalScorer):
    """A frozen vision-language model that answers a Yes/No question about each clip.

    The score is P(Yes) / (P(Yes) + P(No)) of the token after ``answer_prefix``, each summed over
    the spellings that are one token. Several prompts: the maximum of their scores, that is,
    "any of these"; a further prompt costs its own tokens only. Models that think before they
    answer are asked without thoughts.

    Weights load at the first clip, or by `load`, and stay behind when it pickles. Out of memory,
    it halves the batch for good and goes on.

    B: clips, F: frames of a clip, P: prompts, S: tokens of a turn.

    Args:
        model: Folder written by ``save_pretrained`` (model and processor), or a name on the
            Hugging Face hub. Weights are read from safetensors only.
        prompts: The question, or several.
        device: Where the model computes.
        dtype: Precision of the weights, as torch names it; None: bfloat16 on CUDA, else float32.
        attention: Attention implementation; None: the model's default.
        frames: Frames looked at of each clip, evenly spread, the last among them; None: all.
        resolution: Pixels along the edges that frames are resized to; None: as the model's
            processor does. Cost grows with its square. Families whose vision tower knows one
            size only refuse it.
        fps: Frames per second told to the model. Some families score differently under another
            value, so it belongs with the scores.
        answer_prefix: What the model's turn begins with, as the paper's prompts ask; without a
            space behind it. "": the score is read off the turn's first token, for a model that
            says Yes or No at once.
        batch_clips: Clips of one forward pass.
        dedup: Encode equal frames once and keep their embeddings. None: where the model allows
            it (PerceptionLM, SmolVLM). False: the plain path.
        cache_megabytes: Memory for the embeddings kept, least recently used dropped first.
        compile: Whether ``torch.compile`` translates the model's layers: one for all that are
            alike, when it is first met, for each of four numbers of clips, ``batch_clips`` and its
            halves down to an eighth, up to which a batch is filled; those of the vision tower for
            as many numbers of frames, where they are encoded once. Asked several prompts, most of
            the language model is left as it is: its layers then keep what the others do not.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether Python code that comes with the model may run, with your
            rights. Off, such a model is refused.

    Raises:
        FileNotFoundError: ``model`` is a folder that does not exist or holds no safetensors.
        ValueError: No prompt, an empty one, or a number out of range.

    Source:
        VLM-RB, arXiv 2602.01915: the score and its prompt.

    Example:
        >>> scorer = HuggingFaceScorer("facebook/Perception-LM-1B", GOAL, device="cuda:1",
        ...                            frames=16, resolution=224)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        prompts: str | Sequence[str] = GOAL,
        *,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        attention: Attention | None = None,
        frames: int | None = None,
        resolution: int | None = None,
        fps: float = 1.0,
        answer_prefix: str = "Answer:",
        batch_clips: int = 64,
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
        compile: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            model, prompts, device, dtype, frames, batch_clips, dedup, cache_megabytes, revision
        )
        whole = resolution is None or is_whole(resolution, 1)
        require(whole, "resolution", resolution, "it must be a whole number above 0")
        require(is_positive(fps), "fps", fps, "it must be a number above 0")
        bare = isinstance(answer_prefix, str) and answer_prefix == answer_prefix.rstrip()
        require(bare, "answer_prefix", answer_prefix, "give text without a space behind it")
        for name, flag in (("compile", compile), ("trust_remote_code", trust_remote_code)):
            require(isinstance(flag, bool), name, flag, "say True or False")
        known = (None, *get_args(Attention))
        require(attention in list(known), "attention", attention, f"say one of {known}")
        if trust_remote_code:
            warnings.warn(
                f"trust_remote_code=True: Python code that comes with {self.model!r} will run "
                "with your rights; read it, and pin it by revision.",
                stacklevel=2,
            )
        self.attention = attention
        self.resolution, self.fps, self.answer_prefix = resolution, float(fps), answer_prefix
        self._compile, self.trust_remote_code = compile, trust_remote_code

    # ------------------------------------------------------------ loading

    def _read(self) -> Loaded:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        processor, model = self._pretrained("AutoModelForImageTextToText", **options)
        _fold_batch_norms(model)
        if self.resolution is not None:
            _resize_timm_tower(model, self.resolution)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # the answer is read off the last position
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(processor.video_processor, "cap_pixels_per_frame", False) is None:
            # Qwen-VL: as its authors' own reader does.
            processor.video_processor.cap_pixels_per_frame = True
        family = model.config.model_type
        single = family in ENCODED_ONE_BY_ONE
        remedy = f"{family} encodes no frame by itself, pass dedup=False"
        require(single or not self.dedup, "dedup", self.dedup, remedy)
        reused = single and self.dedup is not False
        self._yes, self._no = answer_ids(tokenizer)
        self._answer = answer_start(tokenizer, self.answer_prefix)
        return Loaded(processor, model, FrameEmbeddings(self.cache_megabytes) if reused else None)

    def _try(self) -> None:
        """Look at two black frames: whether a tower takes a size, only the tower knows."""
        loaded, edge = self._loaded, self.resolution
        if edge is not None:
            config = loaded.model.config
            for name in ("image_seq_len", "image_seq_length"):  # tokens a frame, if it is a setting
                if (tokens := getattr(loaded.processor, name, None)) is not None:
                    size = config.vision_config.image_size
                    made_for = size if isinstance(size, int) else size[0]
                    setattr(loaded.processor, name, tokens * edge**2 // made_for**2)
            try:
                self.log_odds(torch.zeros(1, 2, 3, edge, edge, dtype=torch.uint8), ["?"])
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"resolution is {edge}: this {config.model_type} does not look at such frames "
                    f"({reason}), try another multiple of its patches, or None"
                ) from error
        if self._compile:
            _compile_layers(loaded.model)

    # ------------------------------------------------------------ from frames to P(Yes)

    def _ask(self, clips: Tensor) -> Tensor:
        filled = _filled(clips, self.batch_clips) if self._compile else clips
        return self.log_odds(filled, self.prompts)[: len(clips)].sigmoid()

    def log_odds(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logarithm of P(Yes) / P(No) of each clip under each prompt, once the model is loaded.

        The clips, uint8 ``[B, F, 3, H, W]``, are prefilled once, with the words that all P prompts
        begin with; each further word costs its own token. Returns float32 ``[B, P]``.
        """
        if self._loaded.embeddings is None:  # else the frames that are encoded go there alone
            clips = self._resized(clips.to(self._device, non_blocking=True))
        if len(prompts) == 1:
            output = self._run(**self._inputs(clips, prompts[0]), use_cache=False)
            return self._odds(output)[:, None]
        turns = [self._turn(clips, prompt).words["input_ids"][0] for prompt in prompts]
        common = _common_prefix(turns)
        if any(self._sees(turn[common:]) for turn in turns):  # the clip comes after the words
            return torch.cat([self.log_odds(clips, [prompt]) for prompt in prompts], 1)
        whole = self._inputs(clips, prompts[0])
        begun = {k: v[:, :common] if _along(v, len(turns[0])) else v for k, v in whole.items()}
        # From transformers 5.40 on, the older name would be ignored.
        known = _arguments(type(self._loaded.model).forward)
        kept = "cache" if "cache" in known else "past_key_values"
        past = getattr(self._run(**begun, use_cache=True), kept)
        answers = []
        for turn in turns:
            words = turn[common:].expand(len(clips), -1)
            rest = {"input_ids": words, kept: past, **self._places(begun, words)}
            answers.append(self._odds(self._run(**rest, use_cache=True)))
            past.crop(common - len(turn))
        return torch.stack(answers, 1)

    def _odds(self, output: Any) -> Tensor:
        logits = output.logits[:, -1].float()
        odds: Tensor = logits[:, self._yes].logsumexp(-1) - logits[:, self._no].logsumexp(-1)
        return odds

    def _run(self, *, frames: Tensor | None = None, **inputs: Any) -> Any:
        """One forward pass, embeddings ``frames`` ``[B, tokens, width]`` put in their places."""
        model = self._loaded.model
        if frames is not None:  # before transformers 5.23 models ignore those handed over
            places = inputs.pop("places")
            words = model.get_input_embeddings()(inputs.pop("input_ids"))
            # By places, not by a mask, whose places a GPU would be waited for to count.
            words[:, places] = frames.to(words.dtype)
            inputs["inputs_embeds"] = words
        # Without logits_to_keep, a row of 8,232 tokens over 128,256 words costs 4.2 GB.
        return model(**inputs, logits_to_keep=1)

    def _places(self, begun: dict[str, Any], words: Tensor) -> dict[str, Tensor]:
        """Where ``words`` stand after ``begun``, in a model that counts in three dimensions."""
        # Left to itself it would go on from the greatest place: maybe the clip's last second.
        rope = getattr(self._loaded.model.model, "get_rope_index", None)
        if rope is None:
            return {}
        places, _ = rope(**{k: v for k, v in begun.items() if k in _arguments(rope)})
        further = torch.arange(1, words.shape[1] + 1, device=self._device)
        return {"position_ids": places[..., -1:] + further}

    def _inputs(self, clips: Tensor, prompt: str) -> dict[str, Any]:
        """What `_run` reads for ``[B, F, 3, H, W]`` clips and one question."""
        B, turn = len(clips), self._turn(clips, prompt)
        words = {
            k: v.expand(B, *v.shape[1:]) if isinstance(v, Tensor) else v * B
            for k, v in turn.words.items()
        }
        if self._loaded.embeddings is not None:
            frames = self._loaded.embeddings(clips.flatten(0, 1), self._encode)
            frames = frames.reshape(B, -1, frames.shape[-1])
            return {**words, "frames": frames, "places": turn.places}
        if turn.apart:
            return {**words, **self._pixels(clips)}
        return self._processed(clips, [prompt] * B)

    def _turn(self, clips: Tensor, prompt: str) -> _Turn:
        """One clip and a question, as read of a black clip of the same shape."""
        key, turns = (prompt, *clips.shape[1:]), self._loaded.prepared
        if key not in turns:
            black = self._resized(torch.zeros_like(clips[:1], device=self._device))
            whole, pixels = self._processed(black, [prompt]), self._pixels(black)
            seen = [k for k in whole if "pixel" in k]
            apart = {*seen} == {*pixels} and all(torch.equal(whole[k], pixels[k]) for k in seen)
            # Nothing is padded: without a mask, attention takes its fast road without a look at it.
            words = {k: v for k, v in whole.items() if k not in (*seen, "attention_mask")}
            config = self._loaded.model.config
            seen_as = ENCODED_ONE_BY_ONE.get(config.model_type)
            token = getattr(config, f"{seen_as}_token_id", -1)
            places = (words["input_ids"][0] == token).nonzero()[:, 0]
            turns[key] = _Turn(words, places, apart)
        turn: _Turn = turns[key]
        return turn

    def _processed(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """What the processor makes of clips ``[B, F, 3, H, W]`` and as many questions."""
        processor, frames = self._loaded.processor, clips.shape[1]
        texts = {prompt: self._text(prompt) for prompt in prompts}
        metadata = [  # one each: some processors write into it
            {
                "fps": self.fps,
                "duration": frames / self.fps,
                "total_num_frames": frames,
                "frames_indices": list(range(frames)),
                "height": clips.shape[-2],
                "width": clips.shape[-1],
            }
            for _ in clips
        ]
        bos = processor.tokenizer.bos_token
        begun = bool(bos) and all(text.startswith(bos) for text in texts.values())
        inputs = processor(
            text=[texts[prompt] for prompt in prompts],
            videos=[[clip] for clip in clips],
            video_metadata=metadata,
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if begun else {}),
            **self._video_options(),
        )
        return self._placed(inputs)

    def _text(self, prompt: str) -> str:
        """A clip and ``prompt`` in the model's own form, up to where it says Yes or No.

        Thoughts are turned off where the template can, and closed where it begins them.
        """
        processor, answer = self._loaded.processor, self._answer
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        known = "enable_thinking" in str(processor.chat_template)
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
            **({"enable_thinking": False} if known else {}),
        )
        if begun := _THOUGHTS.search(text):
            text += f"\n</{begun[1]}>\n\n"
        marks = tuple(processor.tokenizer.get_added_vocab())
        if answer and not text[-1:].isspace() and not text.endswith(marks):
            text += " "  # behind words, such as "Assistant:"
        return str(text) + answer

    def _video_options(self) -> dict[str, Any]:
        own_size = {} if self.resolution is None else {"do_resize": False}
        # Not sampled: every frame handed in is looked at.
        return {"do_sample_frames": False, "device": str(self._device), **own_size}

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
        frames = self._resized(frames.to(self._device, non_blocking=True))
        if self._compile:
            frames = _filled(frames, FRAMES_AT_ONCE)
        pixels = self._pixels(frames[None])
        encoded = self._loaded.model.model.get_image_features(*pixels.values()).pooler_output
        whole: Tensor = encoded if isinstance(encoded, Tensor) else torch.cat(encoded)
        embeddings: Tensor = whole.reshape(len(frames), -1, whole.shape[-1])[:count]
        return embeddings

    def _pixels(self, clips: Tensor) -> dict[str, Any]:
        """What the model sees of clips ``[B, F, 3, H, W]``, made where they lie."""
        made = self._loaded.processor.video_processor(
            videos=list(clips), return_tensors="pt", **self._video_options()
        )
        return self._placed({k: v for k, v in made.items() if "pixel" in k})

    def _sees(self, tokens: Tensor) -> bool:
        """Whether pictures are put in among ``tokens``."""
        names = ("image_token_id", "video_token_id")
        places = [getattr(self._loaded.model.config, name, None) for name in names]
        return any(bool((tokens == place).any()) for place in places if place is not None)


@dataclass(frozen=True)
class _Turn:
    """A clip and a question as the model reads them, but for what the frames hold.

    Attributes:
        words: The model's arguments that depend on the clip's shape alone, of one clip.
        places: Positions of its frames' tokens, where they are encoded one by one.
        apart: Whether the video processor alone makes the others.
    """

    words: dict[str, Any]
    places: Tensor
    apart: bool


def _compile_layers(module: nn.Module) -> None:
    """Let ``torch.compile`` translate what ``module`` lists: its layers, most of them alike."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                layer.compile(dynamic=False)
        else:
            _compile_layers(child)


def _filled(rows: Tensor, most: int) -> Tensor:
    """Repeat the last row up to an eighth, a quarter, half or all of ``most`` rows.

    What is compiled is translated anew for each number of rows.
    """
    sizes = (-(-most // share) for share in (8, 4, 2, 1))
    more = next(size for size in sizes if size >= len(rows)) - len(rows)
    return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])])


def answer_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that mean Yes and tokens that mean No.

    A spelling counts if it is one token; a lone space piece before it is dropped.

    Raises:
        ValueError: One of the sets is empty, or they share a token.
    """
    found = []
    for words in (YES_WORDS, NO_WORDS):
        ids = set()
        for word in words:
            pieces = tokenizer.encode(word, add_special_tokens=False)
            pieces = [p for p in pieces if tokenizer.decode([p]).strip()]
            if len(pieces) == 1:
                ids.add(pieces[0])
        if not ids:
            reason = f"the tokenizer has no single token for {words[0]!r}"
            raise ValueError(f"{reason}: use another model.")
        found.append(ids)
    if shared := found[0] & found[1]:
        raise ValueError(f"tokens {sorted(shared)} mean Yes and No alike: use another model.")
    return sorted(found[0]), sorted(found[1])


def answer_start(tokenizer: Any, prefix: str) -> str:
    """``prefix`` as the model itself would write it before Yes or No.

    Mostly the space behind it belongs to the token of the answer; where it is one of its own, it
    is written, too.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    spaced = ids(f"{prefix} ")
    apart = all(ids(f"{prefix} {word}")[: len(spaced)] == spaced for word in ("Yes", "No"))
    return f"{prefix} " if prefix and apart else prefix


def _fold_batch_norms(model: nn.Module) -> None:
    """Put batch norms into the convolutions before them: a pass less over the pixels, same sums."""
    for chain in model.modules():
        if not isinstance(chain, nn.Sequential):
            continue
        for k, (first, second) in enumerate(pairwise(chain)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                chain[k] = nn.utils.fuse_conv_bn_eval(first, second)
                chain[k + 1] = nn.Identity()


def _resize_timm_tower(model: nn.Module, edge: int) -> None:
    """Make a tower of timm, which is made for one size, one for frames of ``edge`` pixels.

    A ``dynamic_img_size`` instead would have it compute its rotary embedding anew each time, in
    float32: 30 % of the bytes that the layers of one in bfloat16 write, none when it is kept.
    """
    tower: Any = getattr(getattr(model.base_model, "vision_tower", None), "timm_model", None)
    if hasattr(tower, "set_input_size"):
        tower.set_input_size((edge, edge))
        tower.patch_embed.strict_img_size = False  # it would cut off what fills no patch


def _arguments(function: Callable[..., Any]) -> Mapping[str, Any]:
    return inspect.signature(function).parameters


def _common_prefix(turns: Sequence[Tensor]) -> int:
    """How many tokens the turns begin with alike; at least one of each is left."""
    length = min(map(len, turns)) - 1
    same = torch.stack([turn[:length] == turns[0][:length] for turn in turns]).all(0)
    return int(same.long().cumprod(0).sum())


def _along(value: Any, length: int) -> bool:
    """Whether ``value`` is ``[B, length]``, something of every token."""
    of_tokens = isinstance(value, Tensor) and not value.is_floating_point() and value.ndim == 2
    return of_tokens and value.shape[1] == length
