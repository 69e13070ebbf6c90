"""Scored clips on disk: ``clips.safetensors`` and ``meta.json``, so nothing in it can run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.keys import EVENTS

CLIPS_FILE = "clips.safetensors"
META_FILE = "meta.json"
OF_EACH_CLIP = (EVENTS, "shown", "episode", "first", "transitions")
"""What clips have beside their render states, which may be nested."""


def save(folder: Path, clips: TensorDict, meta: dict[str, Any]) -> None:
    """Write clips ``[N]`` and what is to be known about them.

    Args:
        folder: Made if need be.
        clips: Tensors, in nested TensorDicts if they like.
        meta: Anything that JSON can hold.
    """
    from safetensors.torch import save as packed

    folder.mkdir(parents=True, exist_ok=True)
    flat = clips.flatten_keys(".")
    tensors = {name: tensor.contiguous() for name, tensor in flat.items()}
    partial = folder / f"{CLIPS_FILE}.partial"
    partial.write_bytes(packed(tensors))
    os.replace(partial, folder / CLIPS_FILE)
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """Read what is known about the clips in ``folder``.

    Raises:
        ConfigError: It holds none.
    """
    if not (folder / CLIPS_FILE).is_file() or not (folder / META_FILE).is_file():
        raise ConfigError(f"load is {folder}: it holds no clips; name a folder written by --save")
    try:
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text())
        meta["arguments"]["env"]["class_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"load is {folder}: {META_FILE} is not of --save ({error!r})") from error
    return meta


def load(folder: Path) -> TensorDict:
    """Read the clips in ``folder``, ``[N]``.

    Raises:
        ConfigError: The file is no safetensors, or not one of clips.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / CLIPS_FILE)
    except SafetensorError as error:
        raise ConfigError(f"load is {folder}: {CLIPS_FILE} cannot be read ({error})") from error
    if lacks := [name for name in OF_EACH_CLIP if name not in tensors]:
        raise ConfigError(f"load is {folder}: {CLIPS_FILE} has no {', '.join(lacks)}")
    return TensorDict(tensors, [len(tensors[EVENTS])]).unflatten_keys(".")
