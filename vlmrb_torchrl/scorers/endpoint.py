"""A served video-language model as a judge, asked over OpenAI's chat completions protocol.

vLLM, SGLang, llama.cpp, ``transformers serve`` and hosted services speak it. Serving engines batch
and shard: this is how scoring grows past one machine.

What an answer says is read in ``answers.py``. openai and Pillow are imported when they are needed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import io
import ipaddress
import json
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import MOST_SECONDS, ConfigError, is_positive, is_whole, require
from vlmrb_torchrl.frames import frame_digests, thin
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.prompts import GOAL
from vlmrb_torchrl.scorers.answers import NO_WORDS, YES_WORDS, Answer
from vlmrb_torchrl.scorers.base import PromptedScorer, ScorerUnavailableError

_LOGGER = logging.getLogger("vlmrb_torchrl.scorers")
_INSTALL = "pip install 'vlmrb-torchrl[endpoint]'"
_FORMATS: dict[str, dict[str, Any]] = {
    # Level 1 takes half the time of PNG's default and loses as little.
    "png": {"format": "PNG", "compress_level": 1},
    "jpeg": {"format": "JPEG", "quality": 95},
}
"""How Pillow writes a picture."""
_OTHER_FORMS: tuple[tuple[str, dict[str, str | None], str], ...] = (
    ("max_completion_tokens", {"max_tokens": "max_completion_tokens"}, ""),
    ("temperature", {"temperature": None}, "its answers are drawn at a temperature of its own"),
    (
        "media_io_kwargs",
        {"media_io_kwargs": None},
        "it may look at other frames of a video than those sent; media='images' is sure",
    ),
    ("logprob|token_ids", {"logprob_token_ids": None, "return_tokens_as_token_ids": None}, ""),
    ("logprob", {"logprobs": None, "top_logprobs": None}, "a lower top_logprobs may do"),
)
"""Dialects: what a refusal names, which fields are then named otherwise or left out, and what that
means."""
_OF_ALL = (401, 403, 404)
"""Statuses that refuse the key or the model: whatever is asked, they are the same."""
_LATER = frozenset({408, 409, 425, 429, 502, 503, 504, *range(520, 531)})
"""Statuses that say "later" instead of "never"; those from 520 are of networks before a server."""
_GATEWAY = frozenset({407, 502, 503, 504})
"""Statuses with which a proxy answers in the place of a server that it cannot reach."""
_REMEDIES = {
    401: "put the key it wants into the environment variable {key}",
    403: "put a key that may use this model into the environment variable {key}",
    404: "base_url mostly ends in /v1, and model must be a name that it serves",
    413: "lower frames, or let the server take more",
    429: "ask less at once (concurrency), or see the limits of the key",
}
_REMEDIES_BY_WORDS = {
    "(?i)video": "pass media='images', or lower frames",
    "(?i)image|picture|multi.?modal|context": "lower frames, or let the server take more",
    "": "mend what it names (extra_body sets fields of a request), or see its log",
}
_Result = TypeVar("_Result")


class RequestRefusedError(RuntimeError):
    """A server does not answer this very request: HTTP's ``status``, and its own ``words``."""

    def __init__(self, message: str, status: int, words: str) -> None:
        super().__init__(message)
        self.status = status
        self.words = words


class _NoAnswerError(RuntimeError):
    """An answer is neither Yes nor No."""

    status = "answer"


@dataclass
class _Served:
    """What was learnt of the server."""

    met: bool = False  # it has answered
    root: str = ""  # what it says is behind the model's name
    words_of_ids: dict[int, str] = field(default_factory=dict)  # spellings of Yes and No, if told
    form: dict[str, str | None] = field(default_factory=dict)  # fields renamed or (None) left out
    words: bool = False  # an answer came without log-probabilities of Yes or No
    warned: set[str] = field(default_factory=set)  # said already


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

    changes_no_score = frozenset({"api_key_variable", "concurrency", "retries", "timeout_s"})

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
        variable = api_key_variable
        if not isinstance(variable, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ConfigError(  # not shown: someone may have put the key itself here
                "api_key_variable is no name of an environment variable: put the key into one, "
                "and give its name, such as OPENAI_API_KEY"
            )
        if isinstance(base_url, str) and set(base_url) & set("@?#"):  # not shown: may be a secret
            raise ConfigError(
                "base_url holds a password or a query: give the plain URL, and the key in the "
                f"environment variable {variable}"
            )
        require(_is_url(base_url), "base_url", base_url, "give a URL such as http://host:port/v1")
        named = isinstance(model, str) and bool(model.strip())
        require(named, "model", model, "name one that the server serves")
        for name, count in (
            ("concurrency", concurrency),
            ("max_tokens", max_tokens),
            ("top_logprobs", top_logprobs),
            ("upscale", upscale),
            ("frames", 1 if frames is None else frames),
        ):
            require(is_whole(count, 1), name, count, "it must be a whole number above 0")
        require(is_positive(fps), "fps", fps, "it must be a number above 0")
        waits = is_positive(timeout_s, MOST_SECONDS)
        require(waits, "timeout_s", timeout_s, "it must be positive seconds")
        require(is_whole(retries, 0), "retries", retries, "use a whole number from 0 on")
        require(image_format in list(_FORMATS), "image_format", image_format, "say png or jpeg")
        require(media in ("images", "video"), "media", media, "say images or video")
        more = {} if extra_body is None else extra_body
        try:
            fits = isinstance(more, Mapping) and bool(json.dumps(dict(more), allow_nan=False))
        except (TypeError, ValueError):
            fits = False
        require(fits, "extra_body", more, "pass a dict of what JSON can hold")
        self.base_url, self.model, self.api_key_variable = base_url, model, api_key_variable
        self.frames, self.image_format, self.upscale = frames, image_format, upscale
        self.media, self.fps, self.extra_body = media, fps, dict(more)
        self.max_tokens, self.top_logprobs = max_tokens, top_logprobs
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        self._served = _Served()

    @property
    def revision(self) -> str:
        """What the server says is behind the model's name, and what is read off its answers.

        It does not say which weights those are: give a model another name when they change.
        """
        served = self._served
        return f"{served.root} {'words' if served.words else 'logprobs'}" if served.met else ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_served": _Served()}

    def load(self) -> None:
        """Ask the server for its models, and the model about a black frame.

        Raises:
            ImportError: openai or pillow is not installed.
            ScorerUnavailableError: The server cannot be reached, is busy or broken.
            RuntimeError: It refuses the key, the model or the image.
        """
        if not self._served.met:
            self._served = _Served()
            self._session(self._meet)

    async def _meet(self, client: Any) -> None:
        served, models = self._served, await self._models(client)
        served.root = models.get(self.model, self.model)
        yes = await self._single_tokens(client, YES_WORDS)
        no = await self._single_tokens(client, NO_WORDS)
        if yes and no and not yes.keys() & no.keys():
            served.words_of_ids = yes | no
        black = torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)
        with contextlib.suppress(_NoAnswerError):
            await self._ask(client, self._requests(black)[0])
        if models and self.model not in models:
            _LOGGER.warning(
                "%s answers for model=%r but lists only %s: see that it is the one you mean.",
                self.base_url,
                self.model,
                ", ".join(sorted(models)[:5]),
            )
        served.met = True

    # ------------------------------------------------------------ what is asked

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
        requests = self._requests(clips)

        async def ask_all(client: Any) -> list[float | RuntimeError]:
            places = asyncio.Semaphore(self.concurrency)

            async def ask(request: dict[str, Any]) -> float | RuntimeError:
                async with places:
                    try:
                        return await self._ask(client, request)
                    except (RequestRefusedError, _NoAnswerError) as error:
                        if error.status in _OF_ALL:
                            raise
                        return error

            return await asyncio.gather(*map(ask, requests))

        answers = self._session(ask_all)
        errors = [answer for answer in answers if isinstance(answer, RuntimeError)]
        if len(errors) == len(answers):
            raise errors[0]
        for error in errors:
            kind = f"refused {getattr(error, 'status', '')}"
            self._warn(kind, f"A clip gets no score, the others of its batch do: {error}")
        scores = [math.nan if isinstance(each, RuntimeError) else each for each in answers]
        return torch.tensor(scores).view(len(clips), -1)

    def _requests(self, clips: Tensor) -> list[dict[str, Any]]:
        """What is asked about ``[B, F, 3, H, W]``: clip by clip, each prompt."""
        F = clips.shape[1]
        frames = clips.flatten(0, 1).cpu()
        digests = frame_digests(frames)
        encoded = {
            digest: picture(frames[place], self.image_format, self.upscale)
            for digest, place in {digest: place for place, digest in enumerate(digests)}.items()
        }
        settings = {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0.0}
        if self.media == "video":  # of a longer video vLLM would take the first 32 frames
            settings["media_io_kwargs"] = {"video": {"num_frames": F, "fps": self.fps}}
        requests = []
        for start in range(0, len(digests), F):
            shown = self._shown([encoded[digest] for digest in digests[start : start + F]])
            for prompt in self.prompts:
                content = [*shown, {"type": "text", "text": prompt}]
                message = {"role": "user", "content": content}
                requests.append({**settings, "messages": [message], **self.extra_body})
        return requests

    def _shown(self, frames: list[str]) -> list[dict[str, Any]]:
        """The parts of a message that show a clip."""
        if self.media == "video":  # so vLLM calls a list of pictures, whatever their format
            url = "data:video/jpeg;base64," + ",".join(frames)
            return [{"type": "video_url", "video_url": {"url": url}}]
        urls = [f"data:image/{self.image_format};base64,{frame}" for frame in frames]
        return [{"type": "image_url", "image_url": {"url": url}} for url in urls]

    async def _ask(self, client: Any, request: dict[str, Any]) -> float:
        """The score that a request is answered with."""
        words_of_ids = self._served.words_of_ids
        request = {**request, "logprobs": True, "top_logprobs": self.top_logprobs}
        if words_of_ids:
            request["logprob_token_ids"] = sorted(words_of_ids)
            request["return_tokens_as_token_ids"] = False
        completion = await self._complete(client, request)
        try:
            answer = Answer.of_completion(completion, words_of_ids)
        except (AttributeError, TypeError, LookupError):
            said = self._quotable(completion)
            message = f"{self.base_url} answers {said!r}, no chat completion"
            raise RequestRefusedError(
                f"{message}: base_url mostly ends in /v1.", 200, said
            ) from None
        score = answer.by_tokens()
        if score is None and (score := answer.by_words()) is not None:
            self._note_words("an answer had none of Yes and No")
        if score is None:
            said = f"{answer.text[-80:]!r}{' (cut off)' * answer.cut}"
            raise _NoAnswerError(
                f"{self.model} answers {said}, neither Yes nor No: let the prompt ask for one of "
                "them, raise max_tokens, or turn its thinking off (extra_body)."
            )
        return score

    async def _complete(self, client: Any, request: dict[str, Any]) -> Any:
        """What the server answers, asked in the form that it takes, which is remembered."""
        served = self._served
        form, learnt = dict(served.form), []
        while True:
            named = {form.get(name, name): value for name, value in request.items()}
            body = {name: value for name, value in named.items() if name is not None}
            try:
                completion = await self._post(client, body)
            except RequestRefusedError as error:
                other = _other_form(error, body, blindly=not served.met)
                if other is None:
                    raise
                form |= other[0]
                learnt.append((error.words, *other))
                continue
            for words, fields, meaning in learnt:
                if "logprobs" in fields:
                    self._note_words(f"{words}; {meaning}")
                elif meaning:
                    text = f"{self.base_url} does not take {', '.join(fields)} ({words})"
                    self._warn(meaning, f"{text}: {meaning}.")
            served.form |= form
            return completion

    def _note_words(self, reason: str) -> None:
        self._served.words = True
        self._warn(
            "words",
            f"{self.base_url} gives no log-probabilities ({reason}): an answer counts as 1.0 "
            "for Yes and 0.0 for No.",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._served.warned:
            self._served.warned.add(kind)
            _LOGGER.warning("%s", message)

    # ------------------------------------------------------------ how it is asked

    def _session(self, work: Callable[[Any], Awaitable[_Result]]) -> _Result:
        """Let ``work`` ask through a client of openai's, which is closed in the end."""
        openai = _needed("openai")
        key = self._key
        if not (key.isascii() and key.isprintable()):  # its own error would show the key
            raise ConfigError(f"the key in {self.api_key_variable} is not plain ASCII: set it anew")

        async def within() -> _Result:
            direct = None
            if _is_loopback(self._host):  # no proxy leads there, whatever HTTP_PROXY says
                direct = openai.DefaultAsyncHttpxClient(trust_env=False)
            async with openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=key or "none",  # the client wants one; servers without keys ignore it
                timeout=self.timeout_s,
                max_retries=self.retries,
                http_client=direct,
            ) as client:
                return await work(client)

        return _finish(within())

    async def _post(self, client: Any, body: dict[str, Any]) -> Any:
        """One chat completion; errors are those of `_explained`."""
        openai = _needed("openai")
        try:
            async with asyncio.timeout(self.timeout_s):
                # As chat.completions.create, which takes 3 ms to look through 32 pictures.
                return await client.post(
                    "/chat/completions", body=body, cast_to=openai.types.chat.ChatCompletion
                )
        except (openai.APIError, TimeoutError, json.JSONDecodeError) as error:
            raise self._explained(error) from None  # the original's request holds the key

    async def _models(self, client: Any) -> dict[str, str]:
        """Names of the models it lists, if it does, each with what it says is behind it."""
        openai = _needed("openai")
        try:
            async with asyncio.timeout(self.timeout_s):
                page = await client.with_options(max_retries=0).models.list()
            return {str(card.id): str(getattr(card, "root", None) or card.id) for card in page.data}
        except (openai.APIError, TimeoutError, json.JSONDecodeError, AttributeError, TypeError):
            return {}

    async def _single_tokens(self, client: Any, words: Sequence[str]) -> dict[int, str]:
        """Those of ``words`` that are one token, by its id; empty if the server does not tell."""
        # vLLM and SGLang do, beside the API.
        openai = _needed("openai")
        url = self.base_url.rstrip("/").removesuffix("/v1") + "/tokenize"
        found: dict[int, str] = {}
        try:
            async with asyncio.timeout(self.timeout_s):
                for word in words:
                    body = {"model": self.model, "prompt": word, "add_special_tokens": False}
                    told = await client.with_options(max_retries=0).post(
                        url, body=body, cast_to=object
                    )
                    if len(told["tokens"]) == 1:
                        found[int(told["tokens"][0])] = word
        except (openai.APIError, TimeoutError, ValueError, LookupError, TypeError):
            return {}
        return found

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_variable, "").strip()

    @property
    def _host(self) -> str:
        return urlsplit(self.base_url).hostname or ""

    @property
    def _proxy(self) -> str | None:
        """The environment variable of the proxy that the server is asked through, if any."""
        if _is_loopback(self._host) or proxy_bypass(self._host):
            return None
        names = [f"{kind}_proxy" for kind in (urlsplit(self.base_url).scheme, "all")]
        both = [variable for name in names for variable in (name, name.upper())]
        return next((variable for variable in both if os.environ.get(variable)), None)

    # ------------------------------------------------------------ what an error means

    def _explained(self, error: Exception) -> RuntimeError:
        openai, url = _needed("openai"), self.base_url
        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            return ScorerUnavailableError(
                f"{url} did not answer within {self.timeout_s:g} s: raise timeout_s, or ask less "
                "at once (concurrency)."
            )
        if self._is_proxys(error):
            message = (
                f"{url} is not reached by the proxy of {self._proxy}: start the server, or add "
                f"{self._host} to NO_PROXY."
            )
            never = RequestRefusedError(message, 502, "")  # a proxy that does not lead there
            return ScorerUnavailableError(message) if self._served.met else never
        if isinstance(error, openai.APIStatusError):
            body = error.body
            if isinstance(body, dict):
                body = body.get("message") or body.get("detail") or body
            status, words = error.status_code, self._quotable(body or error.message)
            message = f"{url} answers {status} ({words}): {self._remedy(status, words)}."
            if status in _LATER:
                return ScorerUnavailableError(message)
            # Also 500, after all repeats: maybe of this very request, which must not block.
            return RequestRefusedError(message, status, words)
        if isinstance(error, openai.APIConnectionError):
            cause, remedy = self._quotable(error.__cause__), "or correct base_url"
            if self._proxy:
                cause += f"; through the proxy of {self._proxy}"
                remedy = f"correct base_url, or add {self._host} to NO_PROXY"
            return ScorerUnavailableError(
                f"{url} cannot be reached ({cause}): start the server, {remedy}."
            )
        return ScorerUnavailableError(f"{url} answers broken JSON: see its log.")

    def _is_proxys(self, error: Any) -> bool:
        """Whether a proxy speaks in the place of a server: in HTML or not at all, not in JSON."""
        gateway = getattr(error, "status_code", None) in _GATEWAY
        refused = type(error.__cause__).__name__ == "ProxyError"  # of a server behind https
        return bool(self._proxy) and (refused or (gateway and not isinstance(error.body, dict)))

    def _remedy(self, status: int, words: str) -> str:
        if status in _REMEDIES:
            return _REMEDIES[status].format(key=self.api_key_variable)
        if status >= 500:
            return "see its log"
        return next(r for said, r in _REMEDIES_BY_WORDS.items() if re.search(said, words))

    def _quotable(self, said: object) -> str:
        """What a server said, on one line of moderate length, without the key."""
        words = " ".join(str(said).split())
        return (words.replace(self._key, "***") if self._key else words)[:300]


def picture(frame: Tensor, image_format: str, upscale: int) -> str:
    """A frame, uint8 ``[3, H, W]``, as a picture file in base64, each pixel a square."""
    module = _needed("PIL.Image")
    image = module.fromarray(frame.permute(1, 2, 0).numpy())
    if upscale > 1:
        size = (image.width * upscale, image.height * upscale)
        image = image.resize(size, module.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, **_FORMATS[image_format])
    return base64.b64encode(file.getvalue()).decode()


def _other_form(
    error: RequestRefusedError, body: dict[str, Any], blindly: bool
) -> tuple[dict[str, str | None], str] | None:
    """The form to ask in after a refusal that names a field of ``body``; None if it names none.

    ``blindly``: log-probabilities may be the cause unsaid; not of a clip, which may be refused for
    what it shows.
    """
    guessed = "logprob" if blindly and error.status in (400, 422) else ""
    known = [form for form in _OTHER_FORMS if form[1].keys() & body.keys()]
    for said in filter(None, (error.words, guessed)):
        for words, fields, meaning in known:
            if re.search(words, said, re.IGNORECASE):
                return fields, meaning
    return None


def _is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, as which servers also name 0.0.0.0."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return address.is_loopback or address.is_unspecified


def _is_url(url: object) -> bool:
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port is None or parts.port > 0
    except ValueError:  # brackets or a port that are none
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"EndpointScorer needs {module} ({error}): {_INSTALL}") from error


def _finish(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end, also in a thread whose own loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
