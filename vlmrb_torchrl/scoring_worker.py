"""Judging a batch of clips, and the worker process that does so at the other end of a pipe.

The process is started by `BOOTSTRAP` instead of by ``multiprocessing``: it then neither imports
the user's script again (unless the scorer is defined there) nor refuses to start from a daemonic
process, and it ignores Ctrl-C, which a terminal sends to it too, from its first line on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from vlmrb_torchrl.keys import CLIP, SCORE
from vlmrb_torchrl.scorers.base import (
    InvalidScoreError,
    ScorerUnavailableError,
    check_scores,
)

if TYPE_CHECKING:
    # Not at run time: a worker without frames to draw starts a second sooner without torchrl.
    from torchrl.envs import Transform

FaultKind = Literal["raised", "invalid", "unavailable", "timeout", "died"]

BOOTSTRAP = """
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
import os, sys
descriptor, parent, niceness = map(int, sys.argv[1:])
os.nice(niceness)
from multiprocessing import spawn
from multiprocessing.connection import Connection
connection = Connection(descriptor)
spawn.prepare(connection.recv())
from vlmrb_torchrl.scoring_worker import serve
serve(connection, parent)
"""
"""Program of the worker process; arguments: file descriptor of its end of the pipe, pid of the
parent, niceness. The first message is what ``multiprocessing`` tells a spawned process."""

IN_WORKER = "VLMRB_SCORING_WORKER"
"""Environment variable that is set in worker processes."""

_WATCH_SECONDS = 1.0
"""How long a worker may outlive a parent that was killed while the worker was busy."""


class ScorerError(Exception):
    """A batch of which some clips, or all, got no score, and why.

    Attributes:
        kind: ``"raised"`` (the scorer raised), ``"invalid"`` (it answered something else than
            one number in [0, 1] per clip), ``"unavailable"`` (it cannot answer now, whatever the
            batch), ``"timeout"`` (no answer), ``"died"`` (its process).
        scores: Answer of the scorer, float32 ``[B]``, NaN for a clip without a score; None if
            there is none that could be told apart by clips.
    """

    def __init__(
        self, kind: FaultKind, message: str, scores: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__(message)
        self.kind: FaultKind = kind
        self.scores = scores


def judge(
    transform: Transform | None, scorer: TensorDictModuleBase, clips: TensorDictBase
) -> NDArray[np.float32]:
    """Draw the clips if ``scorer`` wants frames, and score them.

    What ``scorer`` reads goes to its device once: the states, if they are drawn there, or else
    the frames.

    Args:
        transform: Draws ``"clip"`` from ``"render_state"``.
        scorer: Writes ``"score"``.
        clips: Batch ``[B]``, on the CPU.

    Returns:
        Scores, float32 ``[B]`` in [0, 1].

    Raises:
        ScorerError: If the transform or the scorer raised, or a clip has no score.
    """
    B = clips.shape[0]
    try:
        with torch.no_grad():
            device = device_of(scorer)
            if transform is not None and CLIP in scorer.in_keys:
                renderer = getattr(transform, "renderer", None)
                clips = transform(_moved(clips, getattr(renderer, "device", device)))
            clips = _moved(clips.select(*scorer.in_keys, strict=False), device)
            scores = check_scores(scorer(clips).get(SCORE, None), B, scorer).cpu().numpy()
    except InvalidScoreError as error:
        # Another scorer, which this one asks, may have been asked about other clips.
        given = error.scores if error.source is scorer else None
        rest = None if given is None else given.cpu().numpy()
        raise ScorerError("invalid", str(error), rest) from error
    except ScorerUnavailableError as error:
        raise ScorerError("unavailable", one_line(error)) from error
    except Exception as error:
        raise ScorerError("raised", one_line(error)) from error
    if missing := int(np.isnan(scores).sum()):
        text = f"{type(scorer).__name__} gave {missing} of {B} clips no score"
        raise ScorerError("invalid", text, scores)
    return scores


def device_of(scorer: TensorDictModuleBase) -> torch.device:
    """Where ``scorer`` computes; the CPU if it does not say."""
    return torch.device(getattr(scorer, "device", None) or "cpu")


def _moved(clips: TensorDictBase, device: torch.device) -> TensorDictBase:
    def move(entry: Tensor) -> Tensor:
        if entry.device.type == "cpu" and device.type == "cuda":
            return entry.pin_memory().to(device, non_blocking=True)
        return entry.to(device)

    return clips.apply(move, device=None)  # no device of its own: a score may stay on the CPU


def drawing_on(transform: Transform | None, device: torch.device) -> Transform | None:
    """One like ``transform`` that draws on ``device``, if its renderer can, else itself."""
    renderer: Any = getattr(transform, "renderer", None)
    if transform is None or not hasattr(renderer, "on"):
        return transform
    placed = transform.clone()
    placed.renderer = renderer.on(device)
    return placed


def load(scorer: TensorDictModuleBase) -> None:
    """Let ``scorer`` load what is heavy, if it is one that does."""
    try:
        getattr(scorer, "load", lambda: None)()
    except ScorerUnavailableError as error:
        raise ScorerError("unavailable", one_line(error)) from error
    except Exception as error:
        raise ScorerError("raised", f"loading the scorer failed: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """``Type: message`` of an error, on one line of moderate length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def to_numpy(clips: TensorDictBase) -> dict[str, Any]:
    """Nested dict of arrays: what is sent to a worker, with no shared memory of torch's."""
    return {
        key: to_numpy(value) if isinstance(value, TensorDictBase) else value.numpy()
        for key, value in clips.items()
    }


def from_numpy(arrays: dict[str, Any], batch_size: list[int]) -> TensorDict:
    """The inverse of `to_numpy`."""

    def tensors(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: tensors(v) if isinstance(v, dict) else _tensor(v) for k, v in tree.items()}

    return TensorDict(tensors(arrays), batch_size)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def serve(connection: Connection, parent: int) -> None:
    """Answer requests until the other end of ``connection`` closes."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Lets what the scorer imported clean up; a scorer that does not return is killed later.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with contextlib.suppress(EOFError, OSError):
        payload, threads = connection.recv()
        torch.set_num_threads(threads)
        try:
            transform, scorer = pickle.loads(payload)
            load(scorer)
            transform = drawing_on(transform, device_of(scorer))
        except ScorerError as error:
            connection.send((error.kind, str(error)))
            return
        except Exception as error:
            connection.send(("raised", f"the worker cannot read the scorer: {one_line(error)}"))
            return
        connection.send(("ready",))
        while True:
            arrays, clips = connection.recv()
            connection.send(_answer(transform, scorer, from_numpy(arrays, [clips])))


def _answer(
    transform: Transform | None, scorer: TensorDictModuleBase, clips: TensorDict
) -> tuple[Any, ...]:
    try:
        return "scores", judge(transform, scorer, clips)
    except ScorerError as error:
        return error.kind, str(error), error.scores


def _end_with(parent: int) -> None:
    # A closed pipe ends an idle worker at once; this ends one that hangs in its scorer.
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
