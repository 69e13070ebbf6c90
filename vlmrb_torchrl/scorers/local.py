"""What judges share whose weights are computed here: loading, batches, frames encoded once.

transformers is imported when the weights load, at the first clip, not before.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import secrets
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import (
    ConfigError,
    checked_device,
    is_positive,
    is_whole,
    require,
    shown,
)
from vlmrb_torchrl.frames import frame_digests, thin
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.scorers.base import PromptedScorer

_LOGGER = logging.getLogger("vlmrb_torchrl.scorers")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_INSTALL = "pip install 'vlmrb-torchrl[vlm]'"
FRAMES_AT_ONCE = 64


@dataclass
class Loaded:
    """Processor and weights of a judge. As a submodule of it they would enter every checkpoint."""

    processor: Any
    model: Any
    embeddings: FrameEmbeddings | None  # None where frames are not encoded one by one
    prepared: dict[Any, Any] = field(default_factory=dict)  # of prompts, by what it depends on


class LocalScorer(PromptedScorer):
    """A prompted judge with weights read by transformers; a subclass implements `_read`, `_ask`.

    Its arguments are explained where they are written, in `HuggingFaceScorer`. Constructing it is
    cheap; weights load at the first clip, or by `load`. It pickles before and after: the weights
    stay behind and load again from where they came. Out of memory, it halves the batch for good.
    """

    # Rounding aside; device and revision are in ``revision``, once loaded.
    changes_no_score = frozenset(
        {"attention", "batch_clips", "cache_megabytes", "compile", "dedup", "device", "revision"}
    )

    def __init__(
        self,
        model: str | Path,
        prompts: str | Sequence[str],
        device: str | torch.device,
        dtype: str | None,
        frames: int | None,
        batch_clips: int,
        dedup: bool | None,
        cache_megabytes: float,
        revision: str | None,
    ) -> None:
        super().__init__(prompts)
        self.model = _checked_model(model)
        positive = "it must be a whole number above 0"
        require(frames is None or is_whole(frames, 1), "frames", frames, positive)
        require(is_whole(batch_clips, 1), "batch_clips", batch_clips, positive)
        require(dedup is None or isinstance(dedup, bool), "dedup", dedup, "say True, False or None")
        positive = "it must be a number above 0"
        require(is_positive(cache_megabytes), "cache_megabytes", cache_megabytes, positive)
        named = revision is None or (isinstance(revision, str) and bool(revision.strip()))
        require(named, "revision", revision, "name a branch, tag or commit")
        self._device = checked_device(device)
        if dtype is None:
            dtype = "bfloat16" if self._device.type == "cuda" else "float32"
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        floating = isinstance(known, torch.dtype) and known.is_floating_point
        require(floating, "dtype", dtype, "it is none of torch's, say float32 or bfloat16")
        self.dtype = dtype
        self.frames = frames
        self.batch_clips = batch_clips
        self.dedup = dedup
        self.cache_megabytes = float(cache_megabytes)
        self._pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        self._loaded: Any = None  # of `_read`
        self._files: list[tuple[Path, int, int]] = []

    @abstractmethod
    def _read(self) -> Loaded:
        """Read processor and weights."""

    def _try(self) -> None:
        """Refuse what is loaded now, not with the first clips."""

    @abstractmethod
    def _ask(self, clips: Tensor) -> Tensor:
        """Scores of uint8 clips ``[B, F, 3, H, W]`` under each prompt, ``[B, P]``."""

    @property
    def revision(self) -> str:
        """What was loaded and what computes with it; before, what was asked for.

        The hub's commit or a digest of the folder, made when it is asked for; the version of
        transformers and the kind of device, which both have a part in what a clip looks like.
        """
        if self._loaded is None:
            return str(self._pinned.get("revision", ""))
        if self._files:
            whole = hashlib.blake2b(digest_size=16)
            for file in self._files:
                whole.update(file[0].name.encode() + _digest(*file))
            weights = whole.hexdigest()
        else:
            weights = getattr(self._loaded.model.config, "_commit_hash", None) or ""
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
        if self._loaded is not None:
            return
        folder = Path(self.model)
        files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        self._files = [_state(file) for file in files]
        try:
            self._loaded = self._read()
            with torch.inference_mode():
                self._try()
        except BaseException:
            self._loaded = None
            raise

    def _pretrained(
        self, auto_class: str, look: Callable[[Any], None] = lambda config: None, **options: Any
    ) -> tuple[Any, Any]:
        """Read processor and model by the Auto classes, weights from safetensors only.

        ``look`` may change or refuse the configuration before weights are read. ``options`` are
        those of ``from_pretrained``.
        """
        name, code = self.model, options.pop("trust_remote_code", False)
        shared = {**self._pinned, "trust_remote_code": code}
        try:
            import transformers
            from transformers.utils import logging

            shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()  # it would tear the recipe's own
            try:
                config = transformers.AutoConfig.from_pretrained(name, **shared)
                look(config)
                processor = transformers.AutoProcessor.from_pretrained(name, **shared)
                model = getattr(transformers, auto_class).from_pretrained(
                    name,
                    config=config,
                    use_safetensors=True,
                    dtype=getattr(torch, self.dtype),
                    **shared,
                    **options,
                )
            finally:
                if shown:
                    logging.enable_progress_bar()
        except ConfigError:
            raise
        except ImportError as error:
            reason, missing = " ".join(str(error).split())[:300], error.name
            remedy = f"pip install {missing} (or {_INSTALL})" if missing else _INSTALL
            if options.get("attn_implementation") and "flash" in reason.lower():
                remedy = "pip install flash-attn, or attention='sdpa'"
            raise ImportError(f"{name} cannot load ({reason}): {remedy}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{name} cannot load as {auto_class} with its processor ({reason}): check the "
                "name, or save both with save_pretrained."
            ) from error
        return processor, model.to(self._device).eval().requires_grad_(False)

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Move tensors to the device; floating ones to the weights' precision, too."""
        dtype = getattr(torch, self.dtype)
        return {
            name: value.to(self._device, dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def kept_state(self) -> dict[str, Any] | None:
        """The embeddings kept, on which the last bits of the next scores depend.

        Which frames are encoded together, and so are rounded alike, follows from what is kept.
        """
        if self._loaded is None or self._loaded.embeddings is None:
            return None
        return {"fingerprint": self.fingerprint, **self._loaded.embeddings.state_dict()}

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
                    scores.append(self._ask(part).cpu())
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
            f"{self.model} ran out of memory with {clips} clips at once and goes on with "
            f"{self.batch_clips}; set batch_clips or frames lower."
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class FrameEmbeddings:
    """Embeddings of the frames met last, by the frames' content: each is encoded once.

    N: frames, U: different ones among them.

    Args:
        megabytes: Memory for what is kept; the least recently used goes first.

    Attributes:
        encoded: Frames that had to be embedded, ever.

    Example:
        >>> mean = FrameEmbeddings(megabytes=1)
        >>> mean(torch.ones(3, 3, 2, 2, dtype=torch.uint8), lambda f: f.float().mean((1, 2, 3)))
        tensor([1., 1., 1.])
        >>> mean.encoded
        1
    """

    def __init__(self, megabytes: float) -> None:
        self._bytes = megabytes * 1e6
        self._kept: OrderedDict[tuple[torch.Size, bytes], Tensor] = OrderedDict()
        self.encoded = 0

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """What is kept, the least recently used first."""
        return {
            "keys": list(self._kept),
            # Of one camera's frames, and so of one shape.
            "embeddings": torch.stack(list(self._kept.values())).cpu() if self._kept else None,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Keep, on ``device``, what `state_dict` returned."""
        self.clear()
        if state["keys"]:
            kept = state["embeddings"].to(device).unbind()
            self._kept.update((key, e.clone()) for key, e in zip(state["keys"], kept, strict=True))

    def __call__(self, frames: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings of ``[N, 3, H, W]``, one a frame, in their order.

        Args:
            frames: uint8.
            encode: Embeds some of them, ``[U, 3, H, W]`` to ``[U, ...]``, each by itself.
        """
        keys = [(frames.shape[1:], digest) for digest in frame_digests(frames)]
        first: dict[tuple[torch.Size, bytes], int] = {}
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        missing = [key for key in first if key not in self._kept]
        for start in range(0, len(missing), FRAMES_AT_ONCE):
            part = missing[start : start + FRAMES_AT_ONCE]
            encoded = encode(frames[[first[key] for key in part]])
            # Copies: a view would keep the whole batch of embeddings in memory.
            self._kept.update((key, e.clone()) for key, e in zip(part, encoded, strict=True))
        self.encoded += len(missing)
        for key in first:
            self._kept.move_to_end(key)
        different = torch.stack([self._kept[key] for key in first])
        while len(self._kept) * different[0].nbytes > self._bytes:
            self._kept.popitem(last=False)
        place = {key: row for row, key in enumerate(first)}
        return different[torch.tensor([place[key] for key in keys], device=different.device)]


def _checked_model(model: str | Path) -> str:
    """Return a hub name as it is, unasked, or the path of a folder that holds safetensors."""
    text = isinstance(model, (str, Path)) and bool(str(model).strip()) and "\0" not in str(model)
    require(text, "model", model, "give a folder or a hub name")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if isinstance(model, str) and _HUB_NAME.fullmatch(model):
            return model
        raise FileNotFoundError(
            f"model is {shown(model)}: there is no such folder, give one of save_pretrained, or a "
            "hub name"
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model is {shown(model)}: it holds no .safetensors, the only weights read, save it "
            "again with save_pretrained"
        )
    return str(folder)


def _state(file: Path) -> tuple[Path, int, int]:
    """A file's size and the time of its last change: what was loaded, before it was."""
    # st_ctime: unlike st_mtime, nothing that copies files sets it back.
    return file, file.stat().st_size, file.stat().st_ctime_ns


@functools.cache
def _digest(file: Path, size_bytes: int, changed_ns: int) -> bytes:
    """Digest of a file, of which a process makes one for each of its states."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "blake2b").digest()
    if _state(file) != (file, size_bytes, changed_ns):
        return secrets.token_bytes()  # what was read before is gone: nothing else is like it
    return digest
