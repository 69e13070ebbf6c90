"""A served video-language model as a judge, asked over OpenAI's chat completions protocol.

vLLM, SGLang, llama.cpp, ``transformers serve`` and hosted services speak it. Serving engines batch
and shard: this is how scoring grows past one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import quoted
from vlmrb_torchrl.frames import frame_digests, thin
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.prompts import GOAL
from vlmrb_torchrl.scorers.answers import Answer
from vlmrb_torchrl.scorers.base import PromptedScorer, check_positive
from vlmrb_torchrl.scorers.chat import (
    FORMATS,
    ChatServer,
    RequestRefusedError,
    checked_body,
    part,
    picture,
)
from vlmrb_torchrl.scorers.pretrained import NO_WORDS, YES_WORDS

_LOGGER = logging.getLogger("vlmrb_torchrl.scorers")
_EXACT = ("logprob_token_ids", "return_tokens_as_token_ids")
_OTHER_FORMS: tuple[tuple[str, dict[str, str | None], str], ...] = (
    ("max_completion_tokens", {"max_tokens": "max_completion_tokens"}, ""),
    ("temperature", {"temperature": None}, "its answers are drawn at a temperature of its own"),
    (
        "media_io_kwargs",
        {"media_io_kwargs": None},
        "it may look at other frames of a video than those sent; media='images' is sure",
    ),
    ("logprob|token_ids", dict.fromkeys(_EXACT), ""),
    ("logprob", dict.fromkeys(("logprobs", "top_logprobs")), "a lower top_logprobs may do"),
)
"""Dialects: what a refusal names, which fields are then named otherwise or left out, and what that
means."""
_OF_ALL = (401, 403, 404)
"""Statuses that refuse the key or the model: whatever is asked, they are the same."""


class EndpointScorer(PromptedScorer):
    """A vision-language model behind an OpenAI-compatible server, asked a Yes/No question.

    Each clip and prompt is one request: the frames, then the question. The score is
    P(Yes) / (P(Yes) + P(No)) at the answer's token, whatever the model thinks aloud before it. A
    server that gives no log-probabilities is taken at its word, 1.0 for Yes and 0.0 for No; a
    warning says so once. A clip whose request is refused, or answered with neither, gets NaN.

    Constructing it contacts nobody; `load` asks one question about a black frame, so that a server
    that is not there, or serves no such model, is known before the first clip. What a server's
    dialect does not know, such as ``temperature``, is left out from then on. One that tells its
    token ids, as vLLM does, is asked for exactly those of Yes and No, however unlikely they are.
    A frame that occurs several times in a batch is encoded once.

    B: clips, F: frames of a clip, P: prompts.

    Args:
        base_url: Where the server's API starts, such as ``"http://localhost:8000/v1"``.
        model: The name by which the server knows the model.
        prompts: The question, or several. Each is a request of its own; a server that caches
            prefixes reads the frames once.
        frames: Frames sent of each clip, spread evenly, the last always among them; None: all.
        concurrency: Requests under way at once, at most.
        timeout_s: Seconds until a question is given up, its repeats and pauses included. Keep it
            below the ``timeout_s`` of `AsyncScorer`.
        retries: Repeats of a request that found the server down, busy or broken, after pauses that
            double from half a second.
        api_key_variable: Environment variable that holds the key, if the server wants one. The
            key is sent to ``base_url``, and neither kept nor logged.
        max_tokens: Tokens that the answer may have.
        top_logprobs: Candidates asked for at each token. 20 is the most that OpenAI's protocol and
            vLLM's default allow.
        image_format: ``"png"``, which loses nothing, or ``"jpeg"``.
        upscale: Factor by which frames are enlarged, each pixel becoming a square, for models that
            make out little in tiny ones.
        media: ``"images"``: each frame is an image, which every server takes; ``"video"``: the
            frames are one video, in the form that vLLM documents for frames taken by the client.
        fps: Frames per second that the server is told of a video.
        extra_body: Fields added to each request, for what a server offers beyond the protocol:
            ``{"chat_template_kwargs": {"enable_thinking": False}}``.

    Raises:
        ValueError: A URL that is none or holds a password, no model or prompt, a number out of
            range.

    Source:
        Prompt and score: VLM-RB, arXiv 2602.01915. Request: OpenAI's API reference, "Create chat
        completion"; a video: vLLM's documentation, "Pre-extracted frame sequences".

    Example:
        >>> EndpointScorer("http://localhost:8000/v1", "Qwen/Qwen3-VL-4B-Instruct").concurrency
        8
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        prompts: str | Sequence[str] = GOAL,
        *,
        frames: int | None = None,
        concurrency: int = 8,
        timeout_s: float = 50.0,
        retries: int = 3,
        api_key_variable: str = "OPENAI_API_KEY",
        max_tokens: int = 8,
        top_logprobs: int = 20,
        image_format: Literal["png", "jpeg"] = "png",
        upscale: int = 1,
        media: Literal["images", "video"] = "images",
        fps: float = 1.0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(prompts)
        self.chat = ChatServer(base_url, timeout_s, retries, api_key_variable)
        self.model = model
        self.frames = frames
        self.concurrency = concurrency
        self.max_tokens = max_tokens
        self.top_logprobs = top_logprobs
        self.image_format = image_format
        self.upscale = upscale
        self.media = media
        self.fps = fps
        self.extra_body = checked_body(extra_body)
        self._served: _Served | None = None
        self._check()

    def _check(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model={quoted(self.model)}: name one that the server serves.")
        for name in ("concurrency", "max_tokens", "top_logprobs", "upscale"):
            check_positive(name, getattr(self, name), whole=True)
        check_positive("frames", self.frames, whole=True, or_none=True)
        check_positive("fps", self.fps)
        if self.image_format not in list(FORMATS):
            raise ValueError(f"image_format={quoted(self.image_format)}: say png or jpeg.")
        if self.media not in ("images", "video"):
            raise ValueError(f"media={quoted(self.media)}: say images or video.")

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """What the scores depend on."""
        names = ("model", "prompts", "frames", "media", "fps", "image_format", "upscale")
        return (
            ("base_url", self.chat.base_url),
            *((name, getattr(self, name)) for name in names),
            ("max_tokens", self.max_tokens),
            ("top_logprobs", self.top_logprobs),
            ("extra_body", json.dumps(self.extra_body, sort_keys=True)),
        )

    @property
    def revision(self) -> str:
        """What the server says is behind the model's name, and what is read off its answers.

        It does not say which weights those are: give a model another name when they change.
        """
        if self._served is None:
            return ""
        return f"{self._served.root} {'words' if self._served.words else 'logprobs'}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_served": None}

    def load(self) -> None:
        """Ask the server for its models, and the model about a black frame.

        Raises:
            ImportError: openai or pillow is not installed.
            ScorerUnavailableError: The server cannot be reached, is busy or broken.
            RuntimeError: It refuses the key, the model or the image.
        """
        if self._served is None:
            self._served = self.chat.session(self._meet)

    async def _meet(self, client: Any) -> _Served:
        models = await self.chat.models(client)
        served = _Served(models.get(self.model, self.model))
        yes, no = [
            await self.chat.single_tokens(client, self.model, words)
            for words in (YES_WORDS, NO_WORDS)
        ]
        if yes and no and not yes.keys() & no.keys():
            served.words_of_ids = yes | no
        black = torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)
        with contextlib.suppress(_NoAnswerError):
            await self._ask(client, served, self._requests(black)[0])
        if models and self.model not in models:
            _LOGGER.warning(
                "%s answers for model=%r but lists only %s: see that it is the one you mean.",
                self.chat.base_url,
                self.model,
                ", ".join(sorted(models)[:5]),
            )
        served.met = True
        return served

    def score_prompts(self, tensordict: TensorDictBase) -> Tensor:
        """P(Yes) / (P(Yes) + P(No)) of each clip under each prompt, float32 ``[B, P]``.

        NaN where a request is refused or its answer is neither Yes nor No; a warning says so once
        for each kind of refusal.

        Raises:
            ScorerUnavailableError: The server cannot be reached, is busy or broken.
            RuntimeError: It refuses the key or the model, or no request gets a score.
        """
        clips = thin(tensordict[CLIP], self.frames)
        if not len(clips):
            return torch.zeros(0, len(self.prompts))
        self.load()
        assert self._served is not None
        served, requests = self._served, self._requests(clips)

        async def ask_all(client: Any) -> list[float | RuntimeError]:
            places = asyncio.Semaphore(self.concurrency)

            async def ask(request: dict[str, Any]) -> float | RuntimeError:
                async with places:
                    try:
                        return await self._ask(client, served, request)
                    except (RequestRefusedError, _NoAnswerError) as error:
                        if getattr(error, "status", None) in _OF_ALL:
                            raise
                        return error

            return await asyncio.gather(*map(ask, requests))

        answers = self.chat.session(ask_all)
        errors = [answer for answer in answers if isinstance(answer, RuntimeError)]
        if len(errors) == len(answers):
            raise errors[0]
        for error in errors:
            kind = f"refused {getattr(error, 'status', 'answer')}"
            self._warn(served, kind, f"A clip gets no score, the others of its batch do: {error}")
        scores = [math.nan if isinstance(each, RuntimeError) else each for each in answers]
        return torch.tensor(scores).view(len(clips), -1)

    def _requests(self, clips: Tensor) -> list[dict[str, Any]]:
        """What is asked about ``[B, F, 3, H, W]``: clip by clip, each prompt."""
        B, F = clips.shape[:2]
        frames = clips.flatten(0, 1).cpu()
        digests = frame_digests(frames)
        places = {digest: place for place, digest in enumerate(digests)}
        encoded = {
            digest: picture(frames[place], self.image_format, self.upscale)
            for digest, place in places.items()
        }
        extra = dict(self.extra_body)
        if self.media == "video":  # of a longer video vLLM would take the first 32 frames
            extra = {"media_io_kwargs": {"video": {"num_frames": F, "fps": self.fps}}, **extra}
        return [
            {
                "model": self.model,
                "messages": [
                    {"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}
                ],
                "max_tokens": self.max_tokens,
                "temperature": 0.0,
                **extra,
            }
            for shown in (
                self._shown([encoded[d] for d in digests[k * F : k * F + F]]) for k in range(B)
            )
            for prompt in self.prompts
        ]

    def _shown(self, frames: list[str]) -> list[dict[str, Any]]:
        """The parts of a message that show a clip."""
        if self.media == "video":  # so vLLM calls a list of pictures, whatever their format
            return [part("video_url", "data:video/jpeg;base64," + ",".join(frames))]
        prefix = f"data:image/{self.image_format};base64,"
        return [part("image_url", prefix + frame) for frame in frames]

    async def _ask(self, client: Any, served: _Served, request: dict[str, Any]) -> float:
        """The score that a request is answered with."""
        request = {**request, "logprobs": True, "top_logprobs": self.top_logprobs}
        if served.words_of_ids:
            exact = (sorted(served.words_of_ids), False)
            request.update(zip(_EXACT, exact, strict=True))
        completion = await self._complete(client, served, request)
        try:
            answer = Answer.of_completion(completion, served.words_of_ids)
        except (AttributeError, TypeError, LookupError):
            said = self.chat.quotable(completion)
            message = f"{self.chat.base_url} answers {said!r}, no chat completion"
            raise RequestRefusedError(
                f"{message}: base_url mostly ends in /v1.", 200, said
            ) from None
        score = answer.by_tokens()
        if score is None and (score := answer.by_words()) is not None:
            self._note_words(served, "an answer had none of Yes and No")
        if score is None:
            said = f"{answer.text[-80:]!r}{' (cut off)' * answer.cut}"
            raise _NoAnswerError(
                f"{self.model} answers {said}, neither Yes nor No: let the prompt ask for one of "
                "them, raise max_tokens, or turn its thinking off (extra_body)."
            )
        return score

    async def _complete(self, client: Any, served: _Served, request: dict[str, Any]) -> Any:
        """What the server answers, asked in the form that it takes, which is remembered."""
        form, learnt = dict(served.form), []
        while True:
            body = {
                new: value
                for name, value in request.items()
                if (new := form.get(name, name)) is not None
            }
            try:
                completion = await self.chat.complete(client, body, served.met)
            except RequestRefusedError as error:
                other = _other_form(error, body, blindly=not served.met)
                if other is None:
                    raise
                form |= other[0]
                learnt.append((error.words, *other))
                continue
            for words, fields, meaning in learnt:
                if "logprobs" in fields:
                    self._note_words(served, f"{words}; {meaning}")
                elif meaning:
                    text = f"{self.chat.base_url} does not take {', '.join(fields)} ({words})"
                    self._warn(served, meaning, f"{text}: {meaning}.")
            served.form |= form
            return completion

    def _note_words(self, served: _Served, reason: str) -> None:
        served.words = True
        self._warn(
            served,
            "words",
            f"{self.chat.base_url} gives no log-probabilities ({reason}): an answer counts as 1.0 "
            "for Yes and 0.0 for No.",
        )

    def _warn(self, served: _Served, kind: str, message: str) -> None:
        if kind not in served.warned:
            served.warned.add(kind)
            _LOGGER.warning("%s", message)


def _other_form(
    error: RequestRefusedError, body: dict[str, Any], blindly: bool
) -> tuple[dict[str, str | None], str] | None:
    """The form to ask in after a refusal that names a field of ``body``; None if it names none.

    Args:
        error: The refusal.
        body: What was refused.
        blindly: Whether log-probabilities may be the cause although nothing says so. Of a black
            frame they may; a clip may be refused for what it shows.
    """
    guessed = "logprob" if blindly and error.status in (400, 422) else ""
    known = [form for form in _OTHER_FORMS if form[1].keys() & body.keys()]
    for said in filter(None, (error.words, guessed)):
        for words, fields, meaning in known:
            if re.search(words, said, re.IGNORECASE):
                return fields, meaning
    return None


class _NoAnswerError(RuntimeError):
    """An answer is neither Yes nor No."""


@dataclass
class _Served:
    """What was learnt of the server.

    Attributes:
        root: What it says is behind the model's name.
        words_of_ids: Spellings of Yes and No by their token ids, if it tells them.
        met: Whether it has answered.
        form: Fields that it takes under another name, or not at all (None).
        words: Whether an answer came without log-probabilities of Yes or No.
        warned: What has been said already.
    """

    root: str
    words_of_ids: dict[int, str] = field(default_factory=dict)
    met: bool = False
    form: dict[str, str | None] = field(default_factory=dict)
    words: bool = False
    warned: set[str] = field(default_factory=set)
