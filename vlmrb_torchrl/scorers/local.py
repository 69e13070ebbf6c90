"""What judges share whose weights are computed here: when they load, and how batches are cut."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import checked_device, quoted
from vlmrb_torchrl.frames import thin
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.scorers.base import PromptedScorer, check_positive
from vlmrb_torchrl.scorers.pretrained import (
    checked_dtype,
    checked_model,
    files_of,
    weights_revision,
)

_LOGGER = logging.getLogger("vlmrb_torchrl.scorers")


class LocalScorer(PromptedScorer):
    """A prompted judge with weights read by transformers; a subclass implements `_read`, `_ask`.

    Constructing it is cheap; weights load at the first clip (or by `load`). It pickles before
    and after: the weights stay behind and load again from where they came. Out of memory, it
    halves the batch for good and goes on.

    Args:
        model: Folder written by ``save_pretrained``, or a name on the hub.
        prompts: What is asked.
        device: Where the model computes.
        dtype: Precision of the weights; None: bfloat16 on CUDA, else float32.
        frames: Frames looked at of each clip; None: all.
        batch_clips: Clips of one forward pass.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: ``model`` is a folder that does not exist or holds no safetensors.
        ValueError: No prompt, an empty one, or a number out of range.
    """

    def __init__(
        self,
        model: str | Path,
        prompts: str | Sequence[str],
        *,
        device: str | torch.device,
        dtype: str | None,
        frames: int | None,
        batch_clips: int,
        revision: str | None,
    ) -> None:
        super().__init__(prompts)
        self.model_name = checked_model(model)
        check_positive("frames", frames, whole=True, or_none=True)
        check_positive("batch_clips", batch_clips, whole=True)
        if revision is not None and not (isinstance(revision, str) and revision.strip()):
            raise ValueError(f"revision={quoted(revision)}: name a branch, tag or commit.")
        self._device = checked_device(device)
        self.dtype = checked_dtype(dtype, self._device)
        self.frames = frames
        self.batch_clips = batch_clips
        self._pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        # In a plain object: as a submodule the weights would enter every checkpoint.
        self._loaded: Any = None
        self._files: list[tuple[Path, int, int]] = []

    @abstractmethod
    def _read(self) -> Any:
        """Read processor and weights; what is returned has a ``model``."""

    @abstractmethod
    def _ask(self, loaded: Any, clips: Tensor) -> Tensor:
        """Scores of uint8 clips ``[B, F, 3, H, W]`` under each prompt, ``[B, P]``."""

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """What the scores depend on."""
        return (
            ("model", self.model_name),
            ("prompts", self.prompts),
            ("dtype", self.dtype),
            ("frames", self.frames),
        )

    @property
    def revision(self) -> str:
        """What was loaded and what computes with it; before, what was asked for.

        The hub's commit or a digest of the folder, made when it is asked for; the version of
        transformers and the kind of device, which both have a part in what a clip looks like.
        """
        if self._loaded is None:
            return str(self._pinned.get("revision", ""))
        weights = weights_revision(self._loaded.model, self._files)
        return f"{weights} transformers {version('transformers')} {self._device.type}"

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
            ValueError: There is no such model, or it cannot do what the arguments ask for.
        """
        if self._loaded is None:
            self._files = files_of(self.model_name)
            self._loaded = self._read()

    def kept_state(self) -> dict[str, Any] | None:
        """The embeddings kept, on which the last bits of the next scores depend.

        Which frames are encoded together, and so are rounded alike, follows from what is kept.
        """
        embeddings = getattr(self._loaded, "embeddings", None)
        if embeddings is None:
            return None
        return {"fingerprint": self.fingerprint, **embeddings.state_dict()}

    def load_kept_state(self, state: dict[str, Any] | None) -> None:
        """Go on with the embeddings of `kept_state`: the next scores are the same to the bit.

        Another judge's are let go.
        """
        if state is not None:
            self.load()
            if state["fingerprint"] == self.fingerprint:
                self._loaded.embeddings.load_state_dict(state, self._device)

    def score_prompts(self, tensordict: TensorDictBase) -> Tensor:
        """Score of each clip under each prompt, float32 ``[B, P]``."""
        self.load()
        clips = thin(tensordict[CLIP], self.frames)
        scores: list[Tensor] = [torch.zeros(0, len(self.prompts))]
        start = 0
        while start < len(clips):
            part = clips[start : start + self.batch_clips]
            try:
                with torch.inference_mode():
                    scores.append(self._ask(self._loaded, part).cpu())
            except RuntimeError as error:
                self._halve(len(part), error)
            else:
                start += len(part)
        return torch.cat(scores)

    def _halve(self, clips: int, error: RuntimeError) -> None:
        """Go on with half the batch after running out of memory; anything else is raised."""
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not memory or clips == 1:
            raise error
        self.batch_clips = clips // 2
        _LOGGER.warning(
            "%s ran out of memory with %d clips at once and goes on with %d; set batch_clips or "
            "frames lower.",
            self.model_name,
            clips,
            self.batch_clips,
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
