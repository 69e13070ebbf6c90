"""Any video-language model of transformers as a judge: P(Yes) / (P(Yes) + P(No)) of one prefill.

One path serves every family (PerceptionLM, SmolVLM, Qwen2.5-VL, Qwen3-VL, InternVL and
LLaVA-OneVision are tested): the processor's chat template over a batch of clips, one forward
pass, no generation. Where frames are encoded one by one (PerceptionLM, SmolVLM), equal frames are
encoded once and kept; the score is the same.

transformers is imported when the weights load, at the first clip, not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from vlmrb_torchrl.checks import quoted
from vlmrb_torchrl.prompts import GOAL
from vlmrb_torchrl.scorers.base import check_flag, check_positive
from vlmrb_torchrl.scorers.local import LocalScorer
from vlmrb_torchrl.scorers.vision_language import VisionLanguageModel

Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]


class HuggingFaceScorer(LocalScorer):
    """A frozen vision-language model that answers a Yes/No question about each clip.

    The score is P(Yes) / (P(Yes) + P(No)) of the token after ``answer_prefix``, each summed over
    the spellings that are one token. Several prompts: the maximum of their scores, that is,
    "any of these"; a further prompt costs its own tokens only. Models that think before they
    answer are asked without thoughts.

    Constructing it is cheap; weights load at the first clip (or by `load`). It pickles before
    and after: the weights stay behind and load again from where they came. Out of memory, it
    halves the batch for good and goes on.

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
        compile: Whether ``torch.compile`` translates the model, which takes a minute or more; the
            vision tower again for each of four numbers of frames, where they are encoded once.
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
            model,
            prompts,
            device=device,
            dtype=dtype,
            frames=frames,
            batch_clips=batch_clips,
            revision=revision,
        )
        check_positive("resolution", resolution, whole=True, or_none=True)
        check_positive("fps", fps)
        check_positive("cache_megabytes", cache_megabytes)
        if not isinstance(answer_prefix, str) or answer_prefix != answer_prefix.rstrip():
            raise ValueError(
                f"answer_prefix={quoted(answer_prefix)}: give text without a space behind it."
            )
        check_flag("dedup", dedup, or_none=True)
        check_flag("compile", compile)
        check_flag("trust_remote_code", trust_remote_code)
        if attention is not None and attention not in get_args(Attention):
            raise ValueError(f"attention={quoted(attention)}: say one of {get_args(Attention)}.")
        if trust_remote_code:
            warnings.warn(
                f"trust_remote_code=True: Python code that comes with {self.model_name!r} will run "
                "with your rights; read it, and pin it by revision.",
                stacklevel=2,
            )
        self.resolution, self.fps, self.answer_prefix = resolution, float(fps), answer_prefix
        self._options: dict[str, Any] = {
            "dedup": dedup,
            "cache_megabytes": float(cache_megabytes),
            "compiled": compile,
            "trust_remote_code": trust_remote_code,
        }
        if attention is not None:
            self._options["attn_implementation"] = attention

    @classmethod
    def example(cls) -> Self:
        """The embedded judge's folder, asked the paper's prompt."""
        return cls(Path(__file__).parent / "judge", answer_prefix="")

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """What the scores depend on."""
        return (
            *super().config,
            *((name, getattr(self, name)) for name in ("resolution", "fps", "answer_prefix")),
            ("trust_remote_code", self._options["trust_remote_code"]),
        )

    def _read(self) -> VisionLanguageModel:
        return VisionLanguageModel(
            self.model_name,
            device=self._device,
            dtype=getattr(torch, self.dtype),
            fps=self.fps,
            resolution=self.resolution,
            answer_prefix=self.answer_prefix,
            **self._options,
            **self._pinned,
        )

    def _ask(self, loaded: VisionLanguageModel, clips: Tensor) -> Tensor:
        """P(Yes) / (P(Yes) + P(No)) of each clip under each prompt, float32 ``[B, P]``."""
        return loaded.log_odds(clips, self.prompts).sigmoid()
