"""Talking to an OpenAI-compatible server: pictures, deadlines, repeats, and errors of one line.

openai and Pillow are imported when they are needed, not before.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import ipaddress
import json
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from torch import Tensor

from vlmrb_torchrl.checks import MOST_SECONDS, is_positive, is_whole, quoted, shown
from vlmrb_torchrl.scorers.base import ScorerUnavailableError

_INSTALL = "pip install 'vlmrb-torchrl[endpoint]'"
FORMATS: dict[str, dict[str, Any]] = {
    # Level 1 takes half the time of PNG's default and loses as little.
    "png": {"format": "PNG", "compress_level": 1},
    "jpeg": {"format": "JPEG", "quality": 95},
}
"""How Pillow writes a picture."""
_LATER = frozenset({408, 409, 425, 429, 502, 503, 504, *range(520, 531)})
"""Statuses that say "later" instead of "never"; those from 520 are of networks before a server."""
_GATEWAY = frozenset({407, 502, 503, 504})
"""Statuses with which a proxy answers in the place of a server that it cannot reach."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
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
}
_REMEDY = "mend what it names (extra_body sets fields of a request), or see its log"
_Result = TypeVar("_Result")


class RequestRefusedError(RuntimeError):
    """A server does not answer this very request: HTTP's ``status``, and its own ``words``."""

    def __init__(self, message: str, status: int, words: str) -> None:
        super().__init__(message)
        self.status = status
        self.words = words


@dataclass(frozen=True)
class ChatServer:
    """Where a server is and how patiently it is asked.

    Args:
        base_url: Where its API starts; without a password.
        timeout_s: Seconds until a request is given up, repeats and pauses included.
        retries: Repeats of a request that found the server down, busy or broken.
        api_key_variable: Environment variable that holds the key, if the server wants one.

    Raises:
        ValueError: ``base_url`` is no plain URL of HTTP, or a number is out of range.
    """

    base_url: str
    timeout_s: float
    retries: int
    api_key_variable: str

    def __post_init__(self) -> None:
        variable, url = self.api_key_variable, self.base_url
        if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable):
            raise ValueError(  # not shown: someone may have put the key itself here
                "api_key_variable is no name of an environment variable: put the key into one, "
                "and give its name, such as OPENAI_API_KEY."
            )
        if isinstance(url, str) and ("@" in url or "?" in url or "#" in url):  # may be a secret
            raise ValueError(
                "base_url holds a password or a query: give the plain URL, and the key in the "
                f"environment variable {variable}."
            )
        if not isinstance(url, str) or not _is_url(url):
            raise ValueError(f"base_url={quoted(url)}: give a URL such as http://host:port/v1.")
        if not is_positive(self.timeout_s, MOST_SECONDS):
            raise ValueError(f"timeout_s={shown(self.timeout_s)}: it must be positive seconds.")
        if not is_whole(self.retries, 0):
            raise ValueError(f"retries={shown(self.retries)}: it must be a whole number >= 0.")

    def session(self, work: Callable[[Any], Awaitable[_Result]]) -> _Result:
        """Let ``work`` ask through a client of openai's, which is closed in the end.

        Raises:
            ImportError: openai is not installed.
            ValueError: The key holds characters that HTTP does not allow.
        """
        openai = _needed("openai")
        key = os.environ.get(self.api_key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # its own error would show the key
            raise ValueError(f"the key in {self.api_key_variable} is not plain ASCII: set it anew.")

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

    async def complete(self, client: Any, request: dict[str, Any], met: bool) -> Any:
        """One chat completion.

        Args:
            client: Of `session`.
            request: The fields of its body.
            met: Whether the server has answered before. If it has, a proxy that does not reach it
                tells of an outage; if not, of a proxy that does not lead there.

        Raises:
            ScorerUnavailableError: The server is down, busy or broken, also when asked again.
            RequestRefusedError: It refuses the request as such, or a proxy does not lead there.
        """
        openai = _needed("openai")
        try:
            async with asyncio.timeout(self.timeout_s):
                # As chat.completions.create, which takes 3 ms to look through 32 pictures.
                return await client.post(
                    "/chat/completions", body=request, cast_to=openai.types.chat.ChatCompletion
                )
        except (openai.APIError, TimeoutError, json.JSONDecodeError) as error:
            raise self._explained(error, met) from None  # the original's request holds the key

    async def models(self, client: Any) -> dict[str, str]:
        """Names of the models it lists, each with what the server says is behind it.

        Empty if it does not say: not every server has such a list.
        """
        openai = _needed("openai")
        try:
            async with asyncio.timeout(self.timeout_s):
                page = await client.with_options(max_retries=0).models.list()
            return {str(card.id): str(getattr(card, "root", None) or card.id) for card in page.data}
        except (openai.APIError, TimeoutError, json.JSONDecodeError, AttributeError, TypeError):
            return {}

    async def single_tokens(self, client: Any, model: str, words: Sequence[str]) -> dict[int, str]:
        """Those of ``words`` that are one token, by its id; empty if the server does not tell.

        vLLM and SGLang do, beside the API: ``/tokenize``.
        """
        openai = _needed("openai")
        url = self.base_url.rstrip("/").removesuffix("/v1") + "/tokenize"
        found: dict[int, str] = {}
        try:
            async with asyncio.timeout(self.timeout_s):
                for word in words:
                    body = {"model": model, "prompt": word, "add_special_tokens": False}
                    told = await client.with_options(max_retries=0).post(
                        url, body=body, cast_to=object
                    )
                    if len(told["tokens"]) == 1:
                        found[int(told["tokens"][0])] = word
        except (openai.APIError, TimeoutError, ValueError, LookupError, TypeError):
            return {}
        return found

    @property
    def _host(self) -> str:
        return urlsplit(self.base_url).hostname or ""

    @property
    def _proxy(self) -> str | None:
        """The environment variable of the proxy that the server is asked through, if any."""
        if _is_loopback(self._host) or proxy_bypass(self._host):
            return None
        scheme = urlsplit(self.base_url).scheme
        names = [f"{kind}_proxy" for kind in (scheme, "all")]
        both = [variable for name in names for variable in (name, name.upper())]
        return next((variable for variable in both if os.environ.get(variable)), None)

    def _explained(self, error: Exception, met: bool) -> RuntimeError:
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
            return ScorerUnavailableError(message) if met else RequestRefusedError(message, 502, "")
        if isinstance(error, openai.APIStatusError):
            status, words = error.status_code, self._words_of(error)
            message = f"{url} answers {status} ({words}): {self._remedy(status, words)}."
            if status in _LATER:
                return ScorerUnavailableError(message)
            # Also 500, after all repeats: maybe of this very request, which must not block.
            return RequestRefusedError(message, status, words)
        if isinstance(error, openai.APIConnectionError):
            cause, remedy = self.quotable(error.__cause__), "or correct base_url"
            if self._proxy:
                cause += f"; through the proxy of {self._proxy}"
                remedy = f"correct base_url, or add {self._host} to NO_PROXY"
            return ScorerUnavailableError(
                f"{url} cannot be reached ({cause}): start the server, {remedy}."
            )
        return ScorerUnavailableError(f"{url} answers broken JSON: see its log.")

    def _is_proxys(self, error: Any) -> bool:
        """Whether a proxy speaks in the place of a server that it does not reach.

        A server says what is wrong in JSON; a proxy in HTML or not at all.
        """
        gateway = getattr(error, "status_code", None) in _GATEWAY
        refused = type(error.__cause__).__name__ == "ProxyError"  # of a server behind https
        return bool(self._proxy) and (refused or (gateway and not isinstance(error.body, dict)))

    def _remedy(self, status: int, words: str) -> str:
        if status in _REMEDIES:
            return _REMEDIES[status].format(key=self.api_key_variable)
        if status >= 500:
            return "see its log"
        fitting = (remedy for said, remedy in _REMEDIES_BY_WORDS.items() if re.search(said, words))
        return next(fitting, _REMEDY)

    def _words_of(self, error: Any) -> str:
        """The server's own message."""
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        return self.quotable(body or error.message)

    def quotable(self, said: object) -> str:
        """What a server said, on one line of moderate length, without the key."""
        words = " ".join(str(said).split())
        key = os.environ.get(self.api_key_variable, "").strip()
        return (words.replace(key, "***") if key else words)[:300]


def _is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, as which servers also name 0.0.0.0."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return address.is_loopback or address.is_unspecified


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
            and url.isascii()
            and url.isprintable()
            and " " not in url
        )
    except ValueError:  # brackets or a port that are none
        return False


def checked_body(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of the fields to add to a request, or raise ValueError: JSON must hold them."""
    try:
        body = dict(fields or {})
        json.dumps(body, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError):
        raise ValueError(
            f"extra_body={shown(fields)}: pass a dict of what JSON can hold."
        ) from None
    return body


def picture(frame: Tensor, image_format: str, upscale: int = 1) -> str:
    """A frame, uint8 ``[3, H, W]``, as a picture file in base64.

    Args:
        frame: Red, green and blue, 0 to 255.
        image_format: One of `FORMATS`.
        upscale: Pixels along the edge of the square that each pixel becomes.
    """
    module = _needed("PIL.Image")
    image = module.fromarray(frame.permute(1, 2, 0).numpy())
    if upscale > 1:
        size = (image.width * upscale, image.height * upscale)
        image = image.resize(size, module.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, **FORMATS[image_format])
    return base64.b64encode(file.getvalue()).decode()


def part(kind: str, url: str) -> dict[str, Any]:
    """A part of a message: ``kind`` is "image_url" or "video_url"."""
    return {"type": kind, kind: {"url": url}}


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"EndpointScorer needs {module} ({error}): {_INSTALL}") from error


def _finish(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end, also in a thread whose own loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
        running = True
    except RuntimeError:
        running = False
    if not running:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
