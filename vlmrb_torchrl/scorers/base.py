"""What every scorer is: a frozen module that reads a batch of clips and writes one score each.

To add one, write one file with a subclass of `ClipScorer` and, for a short name, one import line
in ``scorers/__init__.py``; the contract tests then find it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from vlmrb_torchrl.checks import is_positive, is_real, is_whole, quoted, shown
from vlmrb_torchrl.keys import CLIP, EVENTS, SCORE


class ClipScorer(TensorDictModuleBase, ABC):
    """A frozen judge of clips: clips (or simulator events) in, a score in [0, 1] out.

    B: clips in the batch, F: frames shown of a clip, E: events a simulator can report.

    A subclass implements `score`; `forward` checks what goes in and what comes out. Scorers are
    cheap to construct and picklable, since a scorer may be sent to a worker process: whatever is
    heavy (weights) is loaded by `load`, which the worker calls before its first clip.

    NaN says that a clip has no score (its answer could not be read, say) and costs the others of
    the batch nothing: `AsyncScorer` asks about it once more, then counts it as failed.

    Args:
        in_keys: Keys read. ``"clip"`` (uint8 ``[B, F, 3, H, W]``) asks for rendered frames; a
            scorer that reads only ``"events"`` (bool ``[B, E]``) costs no rendering.

    Attributes:
        cheap: True if a batch takes well under a millisecond of Python. `AsyncScorer` then uses a
            thread instead of a process, which would cost more than the scoring.
        deterministic: False if the same clip may get another score the next time.
        frame_size: (H, W) in pixels of the only frames that it knows; None: any.
    """

    cheap: bool = False
    deterministic: ClassVar[bool] = True
    frame_size: tuple[int, int] | None = None

    def __init__(self, in_keys: Sequence[str] = (CLIP,)) -> None:
        super().__init__()
        self.in_keys = list(in_keys)
        self.out_keys = [SCORE]

    @classmethod
    def example(cls) -> Self:
        """A small working instance, which the contract tests judge the class by.

        The clips they hand it have frames of 64 by 64 pixels and three events, named ``goal``,
        ``door`` and ``key``. A class whose arguments have no defaults overrides this.
        """
        return cls()

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """Hashable (name, value) pairs: everything that the scores of a clip depend on.

        A class whose own ``__init__`` takes arguments names them in a ``config`` of its own, or
        its `fingerprint` is None. Values: numbers, strings, paths, torch's dtypes and devices,
        None, other scorers, and tuples of these.
        """
        return ()

    @property
    def revision(self) -> str:
        """Which weights stand behind ``config``; known once they are loaded, "" if there are none.

        A commit of the hub, or a digest of the files. `CachedScorer` reads it with every batch.
        """
        return ""

    @property
    def fingerprint(self) -> str | None:
        """What identifies a clip's scores from run to run; None if another judge could share it.

        A digest of the class, its code, its prompts, ``config`` and ``revision``. The code is this
        package's and that of the files in which the class and its bases stand; what they call in
        other files is for ``config`` to tell. None: the class is not to be found under its name in
        a file (it was made in a function or a notebook), it takes arguments and has no ``config``
        that names them, a value there has no digest, or it has weights and no ``revision``.
        """
        weights = any(True for _ in chain(self.parameters(), self.buffers()))
        if weights and not self.revision:
            return None
        try:
            code = _code(type(self))  # type: ignore[arg-type]  # a class is hashable
            told = _identity((getattr(self, "prompts", ()), self.config))
            whole = repr((code, told, self.revision))
        except TypeError:
            return None
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where this scorer computes: the device of its first parameter, else the CPU."""
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def needs_frames(self) -> bool:
        """Whether clips must be rendered for this scorer."""
        return CLIP in self.in_keys

    def load(self) -> None:
        """Load what is heavy. Called once by a worker before its first clip; may do nothing."""

    @abstractmethod
    def score(self, tensordict: TensorDictBase) -> Tensor:
        """Judge a batch of clips: ``[B]`` in [0, 1], NaN for none, in the order of the batch.

        Args:
            tensordict: The clips, batch ``[B]``, holding at least ``in_keys``.
        """

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``"score"``, float32 ``[B]``, into the clips and return them.

        Raises:
            KeyError: If one of ``in_keys`` is missing.
            TypeError: If they are no TensorDict.
            ValueError: If ``"clip"`` or ``"events"`` is of another dtype or shape than clips have.
            InvalidScoreError: If `score` answered anything but ``[B]`` numbers in [0, 1] or NaN.
        """
        if not isinstance(tensordict, TensorDictBase):
            raise TypeError(f"{self!r} reads a TensorDict of clips, not {shown(tensordict)}.")
        for key in self.in_keys:
            if tensordict.get(key, None) is None:
                raise KeyError(
                    f"{self!r} reads {key!r}, but the clips hold only "
                    f"{sorted(map(str, tensordict.keys()))}; {_REMEDIES.get(key, 'add it')}."
                )
            _check_entry(key, tensordict[key])
        return tensordict.set(
            SCORE, check_scores(self.score(tensordict), tensordict.shape[0], self)
        )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.config)
        return f"{type(self).__name__}({arguments})"


class PromptedScorer(ClipScorer):
    """A judge that answers questions about a clip; a subclass implements `score_prompts`.

    P: prompts. The score of a clip is the maximum over them, that is, "any of these".

    Args:
        prompts: The question, or several.

    Raises:
        ValueError: No prompt, or an empty one.
    """

    def __init__(self, prompts: str | Sequence[str]) -> None:
        super().__init__(in_keys=(CLIP,))
        self.prompts = checked_prompts(prompts)

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The prompts; more, if a subclass takes more."""
        return (("prompts", self.prompts),)

    @abstractmethod
    def score_prompts(self, tensordict: TensorDictBase) -> Tensor:
        """Judge a batch of clips by every prompt: ``[B, P]`` in [0, 1], NaN for none."""

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """Maximum over prompts, ``[B]``."""
        return self.score_prompts(tensordict).amax(-1)

    def asking(self, prompts: str | Sequence[str]) -> Self:
        """The same judge, asked something else; what is loaded already is shared.

        It is a copy with other ``prompts``: what a subclass makes of them, it makes when it scores.
        """
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)  # copy.copy would pickle: without the weights
        other.prompts = checked_prompts(prompts)
        return other


def checked_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """Return the prompts as a tuple; raise ValueError if there is none or one is empty."""
    asked = (prompts,) if isinstance(prompts, str) else prompts
    several = isinstance(asked, Sequence) and all(isinstance(prompt, str) for prompt in asked)
    if not several or not asked or not all(prompt.strip() for prompt in asked):
        raise ValueError(
            f"prompts={quoted(prompts)}: ask at least one question, none of them empty."
        )
    return tuple(asked)


class SeededScorer(ClipScorer):
    """A scorer that draws random numbers from a generator of its own.

    The same seed and the same sequence of batches give the same scores, whatever else draws
    random numbers. The generator's state is part of ``state_dict()``.

    Args:
        in_keys: Keys read, as in `ClipScorer`.
        seed: Where the sequence starts.
    """

    deterministic = False

    def __init__(self, in_keys: Sequence[str] = (), *, seed: int = 0) -> None:
        super().__init__(in_keys)
        self._generator = torch.Generator()
        self.manual_seed(seed)

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The seed; more, if a subclass takes more."""
        return (("seed", self.seed),)

    def manual_seed(self, seed: int) -> None:
        """Start another sequence.

        Raises:
            ValueError: ``seed`` is no whole number from 0 to 2^63 - 1.
        """
        if not is_whole(seed, 0, 2**63 - 1):
            raise ValueError(f"seed is {shown(seed)}; choose a whole number from 0 to 2^63 - 1.")
        self.seed = int(seed)
        self._generator.manual_seed(self.seed)

    def draw(self, clips: int) -> Tensor:
        """The next ``clips`` numbers of the sequence, float32 ``[clips]``, uniform in [0, 1)."""
        return torch.rand(clips, generator=self._generator)

    def get_extra_state(self) -> Tensor:
        """The generator's state, for ``state_dict()``."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the sequence where ``state`` was taken."""
        self._generator.set_state(state.cpu())


@functools.cache
def _code(scorer: type[ClipScorer]) -> str:
    """Digest of a class's name, of this package's code and of the files of the class and its bases.

    Raises:
        TypeError: The class takes arguments and has no ``config`` that names them, or one of the
            classes is not to be found under its name, or in no file.
    """
    first = next(c for c in scorer.__mro__ if {"__init__", "config"} & vars(c).keys())
    if inspect.signature(scorer).parameters and "config" not in vars(first):
        raise TypeError(f"{scorer} has no config that names its arguments.")
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    try:
        for base in scorer.__mro__:
            if base not in ClipScorer.__mro__:
                pickle.dumps(base)  # by name: raises unless the name leads to this very class
                files.append(Path(inspect.getfile(base)))
        code = b"".join(file.read_bytes() for file in files)
    except (pickle.PicklingError, AttributeError, OSError) as error:
        raise TypeError(f"{scorer} cannot be told from another of its name: {error}") from error
    # The script that a run started with is __mp_main__ in the processes that it spawns.
    module = scorer.__module__.replace("__mp_main__", "__main__")
    name = f"{module} {scorer.__qualname__} "
    return hashlib.blake2b(name.encode() + code, digest_size=16).hexdigest()


def _identity(value: object) -> object:
    """What stands for ``value`` in a digest: its ``repr`` is that of no other value.

    Raises:
        TypeError: There is no such thing; of an object, ``repr`` may tell nothing.
    """
    if isinstance(value, ClipScorer) and (known := value.fingerprint) is not None:
        return known
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    if value is None or isinstance(
        value, (int, float, str, bytes, Path, torch.dtype, torch.device)
    ):
        return value
    raise TypeError(f"{value!r} has no digest.")


_REMEDIES = {
    CLIP: "render them first with ClipRenderTransform",
    "events": 'let the environment write ("next", "events")',
}


def _check_entry(key: str, entry: Any) -> None:
    """Refuse clips and events that are none; other keys are a scorer's own."""
    if key == CLIP:
        good = entry.dtype == torch.uint8 and entry.ndim == 5 and entry.shape[2] == 3
        if not good or not all(entry.shape[1:]):
            raise ValueError(
                f"clip is {shown(entry)}; pass uint8 [B, F, 3, H, W], drawn by ClipRenderTransform."
            )
    elif key == EVENTS and (entry.dtype != torch.bool or entry.ndim != 2):
        raise ValueError(f"events is {shown(entry)}; pass bool [B, E], as the environment writes.")


class InvalidScoreError(ValueError):
    """A scorer answered something else than one number in [0, 1], or NaN, per clip.

    Attributes:
        source: Who answered: maybe a scorer that the one that was asked has asked in turn.
        scores: The answer, float32 ``[B]``, with NaN for what is no score; None if it is of
            another shape.
    """

    def __init__(self, message: str, source: object, scores: Tensor | None = None) -> None:
        super().__init__(message)
        self.source, self.scores = source, scores


class ScorerUnavailableError(RuntimeError):
    """A scorer cannot answer now, whatever it is asked: its server is down or busy.

    `AsyncScorer` keeps the batch and asks again, with longer and longer pauses. Any other error
    is laid to the batch: its clips are asked about once more, one by one.
    """


def check_scores(score: Any, clips: int, source: object) -> Tensor:
    """Return the scores as float32 ``[clips]``, each in [0, 1], or NaN where a clip has none.

    Args:
        score: What a scorer answered; ``[clips, 1]`` is taken, too.
        clips: How many clips it was asked about.
        source: Who answered: the scorer, or a name for it.

    Raises:
        InvalidScoreError: If it answered something else.
    """
    if not isinstance(score, Tensor) or score.shape not in ((clips,), (clips, 1)):
        answer = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else shown(score)
        raise InvalidScoreError(
            f"{shown(source)} answered {answer} for {clips} clips; "
            f"score() must return one number per clip, shape ({clips},).",
            source,
        )
    scores = score.detach().reshape(clips).to(torch.float32)
    bad = (scores < 0) | (scores > 1)  # False for NaN
    if bool(bad.any()):
        raise InvalidScoreError(
            f"{shown(source)} answered {scores[bad][0].item():.4}; a score must be a number in "
            "[0, 1], or NaN for none.",
            source,
            scores.masked_fill(bad, torch.nan),
        )
    return scores


def check_positive(name: str, value: Any, *, whole: bool = False, or_none: bool = False) -> None:
    """Raise ValueError naming ``value`` unless it is above 0: whole, or else finite."""
    good = is_whole(value, 1) if whole else is_positive(value)
    if not good and not (or_none and value is None):
        kind = "a whole number, and positive" if whole else "a number, and positive"
        raise ValueError(f"{name}={shown(value)}: it must be {kind}.")


def check_flag(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise ValueError naming ``value`` unless it is True or False: "no" would count as True."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise ValueError(f"{name}={quoted(value)}: say True or False{' or None' * or_none}.")


def check_unit(name: str, value: float) -> float:
    """Return ``value`` as a float if it lies in [0, 1], else raise ValueError naming it."""
    if not is_real(value, 0, 1):
        raise ValueError(f"{name} is {shown(value)}; it is a probability: choose it in [0, 1].")
    return float(value)
