"""Reading a vision-language model from a folder or the hub, and what Yes and No are to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

YES_WORDS = ("Yes", " Yes", "yes", " yes", "YES", " YES")
NO_WORDS = ("No", " No", "no", " no", "NO", " NO")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_INSTALL = "pip install 'vlmrb-torchrl[vlm]'"


def checked_model(model: str | Path) -> str:
    """Return a hub name as it is, or the path of a folder that holds safetensors.

    Raises:
        FileNotFoundError: It is neither. The hub itself is not asked.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if isinstance(model, str) and _HUB_NAME.fullmatch(model):
            return model
        raise FileNotFoundError(
            f"model={str(model)!r} is no folder: give one saved by save_pretrained, or a hub name."
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model={str(model)!r} holds no .safetensors, the only weights read: "
            "save it again with save_pretrained."
        )
    return str(folder)


def read_pretrained(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read processor and model by the Auto classes: safetensors only, no remote code.

    Raises:
        ImportError: transformers, or a package that the model needs, is not installed.
    """
    try:
        return _read(name, dtype)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise ImportError(f"{name} cannot load ({reason}): {_INSTALL}") from error


def _read(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would tear the recipe's own
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return processor, model


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
