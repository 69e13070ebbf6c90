"""Scorers asked about clips, how long they take, and how right they are.

N: clips, E: events, Q: questions put to one scorer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import ConfigError, one_line
from vlmrb_torchrl.judge.collection import behaviour, collect, load
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.judge.statistics import Answers, Estimate, Threshold, best_threshold, estimate
from vlmrb_torchrl.keys import CLIP, EVENTS, SCORE
from vlmrb_torchrl.renderers import ClipRenderTransform
from vlmrb_torchrl.scorers import ClipScorer, PromptedScorer
from vlmrb_torchrl.scorers.base import check_scores

if TYPE_CHECKING:
    from rich.progress import Progress

_AGAIN_BATCHES, _AGAIN_SECONDS = 4, 2.0
"""As much is scored twice, to time frames that were seen before."""
PAPER_STRIDE = 32
"""Transitions from clip to clip in VLM-RB: each is covered once by a clip of 32."""


@dataclass(frozen=True)
class Question:
    """One column of scores: who was asked what, and which events make it true."""

    scorer: str  # short name
    asked: str  # short name: its events where the environment knows it, else its words
    prompts: tuple[str, ...]  # its words; none for a scorer that is not asked in words
    events: tuple[str, ...]  # any of them in a clip makes it a positive

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.scorer}: {self.asked}"


@dataclass(frozen=True)
class Cost:
    """What it took one scorer to answer Q questions about each clip."""

    scorer: str  # short name
    questions: int  # Q
    device: str  # where it computed, "cpu" or "cuda"
    cores: int  # CPU threads it had; 1 on a GPU
    clips_per_s: float  # warm, clips in the order in which they were played
    clips_per_s_again: float  # the same clips at once again; what it keeps of frames pays here
    busy_s_per_clip: float  # seconds of the GPU, or of processor time summed over threads
    draw_ms_per_clip: float  # milliseconds to render a clip, on top; 0 if it reads no frames
    load_s: float
    unanswered: int  # answers that were no score, of Q to each clip

    def env_steps_per_s(self, stride: int) -> float:
        """Environment steps a second that it keeps up with, one clip every ``stride`` steps."""
        return self.clips_per_s * stride

    def hours_per_million_env_steps(self, stride: int) -> float:
        """GPU-hours, or core-hours of this process; what serves a model elsewhere is not in it."""
        return 1e6 / stride * self.busy_s_per_clip / 3600


@dataclass(frozen=True)
class Verdict:
    """What is known about one scorer's answers to one question."""

    question: Question
    answers: Answers
    estimates: dict[str, Estimate]
    best: Threshold | None

    @property
    def positives(self) -> int:
        """Clips in which it happened."""
        return int(self.answers.label.sum())

    @property
    def unshown(self) -> int:
        """Of them, those in which it happened no later than in the first frame shown."""
        return int((self.answers.label & ~self.answers.shown).sum())


class AskedScorer:
    """One scorer, under a name unlike that of the others, and what it is asked."""

    def __init__(self, scorer: ClipScorer, settings: Settings, name: str) -> None:
        self.name, self._settings, self._load_s = name, settings, 0.0
        words: list[tuple[str, ...]] = [getattr(scorer, "prompts", ())]
        self._each: PromptedScorer | None = None  # judged by each of its prompts
        if isinstance(scorer, PromptedScorer) and settings.prompts:
            known = settings.env.prompts
            scorer = self._each = scorer.asking([known.get(p, p) for p in settings.prompts])
            words = [(text,) for text in scorer.prompts]
        self.scorer: ClipScorer = scorer
        self.questions = [self._question(prompts) for prompts in words]

    def _question(self, prompts: tuple[str, ...]) -> Question:
        assert self._settings.event is not None
        event_of = {text: event for event, text in self._settings.env.prompts.items()}
        events = [event_of.get(prompt, self._settings.event) for prompt in prompts]
        events = list(dict.fromkeys(events)) or [self._settings.event]
        known = all(prompt in event_of for prompt in prompts)
        asked = " or ".join(events if known else prompts)
        return Question(self.name, asked, prompts, tuple(events))

    def load(self) -> None:
        """Load what is heavy, or raise a ConfigError."""
        begun = time.perf_counter()
        try:
            self.scorer.load()
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"scorer {self.name} does not load: {one_line(error)}") from error
        self._load_s = time.perf_counter() - begun

    def answers(
        self, clips: TensorDict, advance: Callable[[int], object]
    ) -> tuple[NDArray[np.float64], Cost]:
        """Score all clips ``[N]``; return float ``[N, Q]`` and what it took.

        An answer that is no score counts as a No, which is what replay makes of it.

        Raises:
            ConfigError: The scorer failed, or gave no score at all.
        """
        drawing, again, scoring = 0.0, 0.0, np.zeros(2)
        seen_again, scores = 0, []
        draw = ClipRenderTransform(self._settings.draw)
        for number, part in enumerate(clips.split(self._settings.batch_clips)):
            begun = time.perf_counter()
            batch = draw(part.copy()) if self.scorer.needs_frames else part
            drawing += time.perf_counter() - begun
            if number == 0:
                self._timed(_noise(batch))  # kernels and memory are made at the first batch
            score, seconds = self._timed(batch)
            scores.append(score)
            scoring += seconds
            if number < _AGAIN_BATCHES and again < _AGAIN_SECONDS:
                again += self._timed(batch)[1][0]
                seen_again += len(part)
            advance(len(part))
        answers = torch.cat(scores).double()
        unanswered = int(answers.isnan().sum())
        if unanswered == answers.numel():
            raise ConfigError(f"scorer {self.name} gave none of {len(clips)} clips a score")
        on_gpu = self.scorer.device.type == "cuda"
        cost = Cost(
            scorer=self.name,
            questions=len(self.questions),
            device=self.scorer.device.type,
            cores=1 if on_gpu else self._settings.torch_threads,
            clips_per_s=len(clips) / float(scoring[0]),
            clips_per_s_again=seen_again / again,
            busy_s_per_clip=float(scoring[0 if on_gpu else 1]) / len(clips),
            draw_ms_per_clip=1e3 * drawing / len(clips),
            load_s=self._load_s,
            unanswered=unanswered,
        )
        return answers.nan_to_num(0.0).numpy(), cost

    def _timed(self, batch: TensorDict) -> tuple[Tensor, NDArray[np.float64]]:
        """Scores ``[B, Q]``, and the seconds they took: of wall clock, of processor time."""
        begun = np.array([time.perf_counter(), time.process_time()])
        try:
            score = self._answer(batch)
        except Exception as error:
            kind = type(error).__name__
            raise ConfigError(
                f"scorer {self.name} failed on {len(batch)} clips: {kind}: {one_line(error)}"
            ) from error
        return score, np.array([time.perf_counter(), time.process_time()]) - begun

    def _answer(self, batch: TensorDictBase) -> Tensor:
        if self._each is None:
            scores: Tensor = self.scorer(batch.copy())[SCORE][:, None]
        else:
            with torch.no_grad():
                asked = self._each.score_prompts(batch).unbind(-1)
            scores = torch.stack([check_scores(one, len(batch), self.name) for one in asked], -1)
        return scores.cpu()


def _noise(batch: TensorDict) -> TensorDict:
    """A batch of the same shape whose frames no clip shows: nothing of the clips is seen early."""
    noise = batch.copy()
    if CLIP in batch:
        noise[CLIP] = torch.randint_like(batch[CLIP], 256)
    return noise


def asked_scorers(settings: Settings) -> list[AskedScorer]:
    """The scorers by short names: class and model, numbered where that is not enough."""
    found: list[AskedScorer] = []
    for scorer in settings.scorers:
        model = _model(scorer)
        name = type(scorer).__name__ + (f" {Path(str(model)).name}" if model else "")
        taken = {asked.name for asked in found}
        names = chain([name], (f"{name} #{number}" for number in count(2)))
        free = next(name for name in names if name not in taken)
        found.append(AskedScorer(scorer, settings, free))
    return found


def _model(scorer: ClipScorer) -> object:
    """The model's name, also of a judge within; None if there is none."""
    config = dict(scorer.config)
    inner = config.get("scorer")
    return _model(inner) if isinstance(inner, ClipScorer) else config.get("model")


@dataclass(frozen=True)
class Examination:
    """What came out: one verdict for each scorer and question, one cost for each scorer."""

    settings: Settings
    clips: TensorDict
    scorers: list[AskedScorer]
    verdicts: list[Verdict]
    costs: list[Cost]

    @property
    def strides(self) -> list[int]:
        """At which costs are told: the paper's, and that of the clips."""
        own = int(self.settings.stride or self.settings.clip_transitions)
        return list(dict.fromkeys((PAPER_STRIDE, own)))


def examine(settings: Settings, progress: Progress) -> Examination:
    """Judge the judges; ``progress`` gets a bar for each stage.

    Raises:
        ConfigError: A scorer does not load or fails, or the policy cannot act.
    """
    torch.set_num_threads(settings.torch_threads)
    scorers = asked_scorers(settings)
    if settings.load is None:
        behaviour(settings)  # who cannot act is told of before anything is loaded
    bar = progress.add_task("load judges", total=len(scorers))
    for scorer in scorers:
        scorer.load()  # and one that does not load, before anything is played
        progress.advance(bar)
    if settings.load is None:
        bar = progress.add_task("play", total=settings.clips)
        clips = collect(settings, partial(progress.advance, bar))
    else:
        clips = load(settings)
    verdicts, costs = [], []
    for scorer in scorers:
        bar = progress.add_task(f"ask {scorer.name[:40]}", total=len(clips))
        scores, cost = scorer.answers(clips, partial(progress.advance, bar))
        costs.append(cost)
        for question, score in zip(scorer.questions, scores.T, strict=True):
            columns = [settings.env.event_names.index(event) for event in question.events]
            answers = Answers(
                score=score,
                label=clips[EVENTS][:, columns].any(-1).numpy(),
                shown=clips["shown"][:, columns].any(-1).numpy(),
                episode=clips["episode"].numpy(),
            )
            estimates = estimate(answers, settings.threshold, settings.resamples, settings.seed)
            best = best_threshold(score, answers.label)
            verdicts.append(Verdict(question, answers, estimates, best))
    return Examination(settings, clips, scorers, verdicts, costs)
