"""What every scorer is: a frozen module that reads a batch of clips and writes one score each.

How to add one: README.md beside this file.
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

from vlmrb_torchrl.checks import is_whole, require, shown
from vlmrb_torchrl.keys import CLIP, EVENTS, SCORE

_REMEDIES = {
    CLIP: "render them first with ClipRenderTransform",
    EVENTS: 'let the environment write ("next", "events")',
}


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
        changes_no_score: Arguments of its constructor that no score depends on.
    """

    cheap: bool = False
    deterministic: ClassVar[bool] = True
    frame_size: tuple[int, int] | None = None
    changes_no_score: ClassVar[frozenset[str]] = frozenset()

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
        """(name, value) pairs: the arguments that the scores of a clip depend on.

        They are found under their own names in the scorer; ``...`` stands for one that is not.
        """
        names = inspect.signature(type(self)).parameters
        kept = [name for name in names if name not in self.changes_no_score]
        return tuple((name, getattr(self, name, ...)) for name in kept)

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
        a file (it was made in a function or a notebook), its ``config`` has a value other than
        numbers, strings, paths, torch's dtypes and devices, None, other scorers, and lists, tuples
        and dicts of these, or it has weights and no ``revision``.
        """
        weights = any(True for _ in chain(self.parameters(), self.buffers()))
        if weights and not self.revision:
            return None
        try:
            code = _code(type(self))  # type: ignore[arg-type]  # a class is hashable
            told = _identity((getattr(self, "prompts", ()), self.config))
        except TypeError:
            return None
        whole = repr((code, told, self.revision))
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
            ValueError: If ``"clip"`` or ``"events"`` is of another dtype or shape than clips have,
                or the frames are not of ``frame_size``.
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
        if self.needs_frames:
            self._check_frames(tensordict[CLIP])
        if EVENTS in self.in_keys:
            events = tensordict[EVENTS]
            good = events.dtype == torch.bool and events.ndim == 2
            require(good, "events", events, "pass bool [B, E], as the environment writes")
        scores = check_scores(self.score(tensordict), tensordict.shape[0], self)
        return tensordict.set(SCORE, scores)

    def _check_frames(self, clip: Tensor) -> None:
        good = clip.dtype == torch.uint8 and clip.ndim == 5 and clip.shape[2] == 3
        remedy = "pass uint8 [B, F, 3, H, W], drawn by ClipRenderTransform"
        require(good and all(clip.shape[1:]), "clip", clip, remedy)
        size = tuple(clip.shape[-2:])
        known = self.frame_size or size
        remedy = f"{type(self).__name__} knows {known} only, let the renderer draw such frames"
        require(size == known, "size of the clips' frames, (H, W),", size, remedy)

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
        self.prompts = _checked_prompts(prompts)

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
        other.prompts = _checked_prompts(prompts)
        return other


def _checked_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    asked = (prompts,) if isinstance(prompts, str) else prompts
    several = isinstance(asked, Sequence) and bool(asked)
    good = several and all(isinstance(prompt, str) and prompt.strip() for prompt in asked)
    require(good, "prompts", prompts, "ask at least one question, none of them empty")
    return tuple(asked)


class SeededScorer(ClipScorer):
    """A scorer that draws random numbers from a generator of its own.

    The same ``seed`` and the same sequence of batches give the same scores, whatever else draws
    random numbers. The generator's state is part of ``state_dict()``.
    """

    deterministic = False

    def __init__(self, in_keys: Sequence[str] = (), *, seed: int = 0) -> None:
        super().__init__(in_keys)
        self._generator = torch.Generator()
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> None:
        """Start another sequence, by a whole number from 0 to 2^63 - 1."""
        require(is_whole(seed, 0, 2**63 - 1), "seed", seed, "choose a whole number, 0 to 2^63 - 1")
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


class ScorerWrapper:
    """Mixin of scorers that answer by another one, ``scorer``, and look like it from outside."""

    scorer: ClipScorer

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the other judge is asked; nothing if it is not asked in words."""
        return getattr(self.scorer, "prompts", ())

    @property
    def revision(self) -> str:
        """The other judge's."""
        return self.scorer.revision

    @property
    def device(self) -> torch.device:
        """Where the other judge computes."""
        return self.scorer.device


class InvalidScoreError(ValueError):
    """A scorer, ``source``, answered something else than one number in [0, 1], or NaN, per clip.

    ``scores``: its answer, float32 ``[B]``, with NaN for what is no score; None if it is of another
    shape.
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


@functools.cache
def _code(scorer: type[ClipScorer]) -> str:
    """Digest of a class's name, of this package's code and of the files of the class and its bases.

    TypeError: one of the classes is not to be found under its name, or in no file.
    """
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
    """What stands for ``value`` in a digest: its ``repr`` is that of no other; else TypeError."""
    if isinstance(value, ClipScorer) and (known := value.fingerprint) is not None:
        return known
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    if isinstance(value, dict):
        return tuple(sorted((name, _identity(each)) for name, each in value.items()))
    plain = (int, float, str, bytes, Path, torch.dtype, torch.device)
    if value is None or isinstance(value, plain):
        return value
    raise TypeError(f"{value!r} has no digest.")
