"""Reading a model from a folder or the hub, and what Yes and No are to it."""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from pathlib import Path
from typing import Any

import torch

from vlmrb_torchrl.checks import quoted

YES_WORDS = ("Yes", " Yes", "yes", " yes", "YES", " YES")
NO_WORDS = ("No", " No", "no", " no", "NO", " NO")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_INSTALL = "pip install 'vlmrb-torchrl[vlm]'"


def checked_model(model: str | Path) -> str:
    """Return a hub name as it is, or the path of a folder that holds safetensors.

    Raises:
        FileNotFoundError: It is neither. The hub itself is not asked.
    """
    if not isinstance(model, (str, Path)) or not str(model).strip() or "\0" in str(model):
        raise ValueError(f"model={quoted(model)}: give a folder or a hub name.")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if isinstance(model, str) and _HUB_NAME.fullmatch(model):
            return model
        raise FileNotFoundError(
            f"model={quoted(model)} is no folder: give one of save_pretrained, or a hub name."
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model={str(model)!r} holds no .safetensors, the only weights read: "
            "save it again with save_pretrained."
        )
    return str(folder)


def checked_dtype(dtype: str | None, device: torch.device) -> str:
    """Return ``dtype``, or what suits the device: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        ValueError: torch has no floating dtype of that name.
    """
    if dtype is None:
        return "bfloat16" if device.type == "cuda" else "float32"
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise ValueError(f"dtype={quoted(dtype)} is none of torch's: say float32 or bfloat16.")
    return dtype


def read_pretrained(
    name: str, auto_class: str, *, any_resolution: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Read processor and model by the Auto classes, weights from safetensors only.

    Args:
        name: Folder or hub name.
        auto_class: The model's Auto class, ``"AutoModelForImageTextToText"`` or ``"AutoModel"``.
        any_resolution: Whether a timm tower, made for one size, is to take frames of any.
        options: Of ``from_pretrained``: revision and trust_remote_code go to both, the others to
            the model.

    Raises:
        ImportError: transformers, or a package that the model needs, is not installed.
        ValueError: The folder or hub name holds no model of that kind with its processor.
    """
    try:
        return _read(name, auto_class, any_resolution, **options)
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        remedy = f"pip install {missing} (or {_INSTALL})" if (missing := error.name) else _INSTALL
        if options.get("attn_implementation") and "flash" in reason.lower():
            remedy = "pip install flash-attn, or attention='sdpa'"
        raise ImportError(f"{name} cannot load ({reason}): {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name} cannot load as {auto_class} with its processor ({reason}): check the name, "
            "or save both with save_pretrained."
        ) from error


def _read(name: str, auto_class: str, any_resolution: bool, **options: Any) -> tuple[Any, Any]:
    import transformers
    from transformers.utils import logging

    shared = {k: options.pop(k) for k in ("revision", "trust_remote_code") if k in options}
    shared.setdefault("trust_remote_code", False)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would tear the recipe's own
    try:
        config = transformers.AutoConfig.from_pretrained(name, **shared)
        timm_arguments = getattr(getattr(config, "vision_config", None), "model_args", None)
        if any_resolution and timm_arguments is not None:
            timm_arguments["dynamic_img_size"] = True
        processor = transformers.AutoProcessor.from_pretrained(name, **shared)
        model = getattr(transformers, auto_class).from_pretrained(
            name, config=config, use_safetensors=True, **shared, **options
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return processor, model


def files_of(name: str) -> list[tuple[Path, int, int]]:
    """A model's folder as it is now: files, sizes, times of change; nothing of a hub name."""
    folder = Path(name)
    return [_state(p) for p in sorted(folder.iterdir()) if p.is_file()] if folder.is_dir() else []


def weights_revision(model: Any, files: list[tuple[Path, int, int]]) -> str:
    """The hub's commit of a loaded model, or a digest of its folder's files.

    Args:
        model: The model.
        files: What `files_of` said before it was read.
    """
    if not files:
        return str(getattr(model.config, "_commit_hash", None) or "")
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        whole.update(file[0].name.encode() + _digest(*file))
    return whole.hexdigest()


def _state(file: Path) -> tuple[Path, int, int]:
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
            ids |= set(pieces) if len(pieces) == 1 else set()
        if not ids:
            raise ValueError(
                f"the tokenizer has no single token for {words[0]!r}: use another model."
            )
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
