"""Any video-language model of transformers as a judge: P(Yes) / (P(Yes) + P(No)) of one prefill.

One path serves every family (PerceptionLM, SmolVLM, Qwen2.5-VL, Qwen3-VL, InternVL and
LLaVA-OneVision are tested): the processor's chat template over a batch of clips, one forward
pass, no generation. Where frames are encoded one by one (PerceptionLM, SmolVLM), equal frames are
encoded once and kept; the score is the same.

transformers is imported when the weights load, at the first clip, not before.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.frames import thin
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.prompts import GOAL
from vlmrb_torchrl.scorers.base import PromptedScorer
from vlmrb_torchrl.scorers.pretrained import checked_dtype, checked_model, weights_revision
from vlmrb_torchrl.scorers.vision_language import VisionLanguageModel

_LOGGER = logging.getLogger("vlmrb_torchrl.scoring")

Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]


class HuggingFaceScorer(PromptedScorer):
    """A frozen vision-language model that answers a Yes/No question about each clip.

    The score is P(Yes) / (P(Yes) + P(No)) of the answer's first token, each summed over the
    spellings that are one token. Several prompts: the maximum of their scores, that is,
    "any of these"; a further prompt costs its own tokens only.

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
        batch_clips: Clips of one forward pass.
        dedup: Encode equal frames once and keep their embeddings. None: where the model allows
            it (PerceptionLM, SmolVLM). False: the plain path.
        cache_megabytes: Memory for the embeddings kept, least recently used dropped first.
        compile: Whether ``torch.compile`` translates the model, which takes minutes.
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
        batch_clips: int = 64,
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
        compile: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(prompts)
        self.model_name = checked_model(model)
        for name, value in (
            ("frames", frames),
            ("resolution", resolution),
            ("fps", fps),
            ("batch_clips", batch_clips),
            ("cache_megabytes", cache_megabytes),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: it must be positive.")
        if trust_remote_code:
            warnings.warn(
                f"trust_remote_code=True: Python code that comes with {self.model_name!r} will run "
                "with your rights; read it, and pin it by revision.",
                stacklevel=2,
            )
        self._device = torch.device(device)
        self.dtype = checked_dtype(dtype, self._device)
        self.frames, self.resolution, self.fps = frames, resolution, float(fps)
        self.batch_clips = int(batch_clips)
        self.wanted_revision = revision
        self._options: dict[str, Any] = {
            "dedup": dedup,
            "cache_megabytes": float(cache_megabytes),
            "compiled": compile,
            "trust_remote_code": trust_remote_code,
        }
        if attention is not None:
            self._options["attn_implementation"] = attention
        if revision is not None:
            self._options["revision"] = revision
        self._loaded: VisionLanguageModel | None = None

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
            ("frames", self.frames),
            ("resolution", self.resolution),
            ("fps", self.fps),
        )

    @property
    def revision(self) -> str:
        """The hub's commit or a digest of the folder, once loaded; before, what was asked for."""
        if self._loaded is None:
            return self.wanted_revision or ""
        return weights_revision(self.model_name, self._loaded.model)

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
            ValueError: There is no such model on the hub, or it cannot be reached; the tokenizer
                has no single token for Yes or for No, or one for both; ``dedup=True`` or
                ``resolution`` and the family does not allow it.
        """
        if self._loaded is None:
            # In a plain object: as a submodule the weights would enter every checkpoint.
            self._loaded = VisionLanguageModel(
                self.model_name,
                device=self._device,
                dtype=getattr(torch, self.dtype),
                fps=self.fps,
                resolution=self.resolution,
                **self._options,
            )

    def score_prompts(self, tensordict: TensorDictBase) -> Tensor:
        """P(Yes) / (P(Yes) + P(No)) of each clip under each prompt, float32 ``[B, P]``."""
        self.load()
        assert self._loaded is not None
        clips = thin(tensordict[CLIP], self.frames)
        scores: list[Tensor] = [torch.zeros(0, len(self.prompts))]
        start = 0
        while start < len(clips):
            part = clips[start : start + self.batch_clips]
            try:
                scores.append(self._loaded.log_odds(part, self.prompts).sigmoid().cpu())
            except RuntimeError as error:
                self._halve(len(part), error)
                continue
            start += len(part)
        return torch.cat(scores)

    def _halve(self, clips: int, error: RuntimeError) -> None:
        """Go on with half the batch after running out of memory; anything else is raised."""
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not memory or clips == 1:
            raise error
        self.batch_clips = clips // 2
        _LOGGER.warning(
            "%s ran out of memory with %d clips at once and goes on with %d; set batch_clips, "
            "frames or resolution lower.", self.model_name, clips, self.batch_clips
        )  # fmt: skip
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
