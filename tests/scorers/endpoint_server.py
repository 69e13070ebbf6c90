"""A loopback server that speaks chat completions and goes wrong as its script says.

It judges by brightness: the brightest pixel of the last frame, of 255, is P(Yes), so that a test
knows which clip an answer belongs to.
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "tiny"
PATIENT = 60.0
"""Seconds that only a failing test waits."""


class EndpointServer:
    """Serves from construction to `close`; `stop` and `start` in between are an outage.

    The script names what becomes of each chat request in turn; after its end all are answered.

    - ``"500"``, ``"429"``, any status: refused with it (429 with a Retry-After).
    - ``"gateway"``: 502 as a proxy says it, in HTML.
    - ``"truncated"``: half of the announced bytes. ``"broken"``: half of the JSON.
    - ``"http://…"``: sent on to the server at that URL.
    - ``"page"``: a page of HTML. ``"error"``: status 200 and an error inside.
    - ``"words"``: an answer without log-probabilities.
    - a dict: a choice of the completion, as it is (`choice` makes one).
    - anything else: answered with this text, without log-probabilities.

    Args:
        script: See above.
        refuses: Fields of a request that it answers with 400, and in which words.
        held: Requests wait until the test lets them go on (`release`).
        listed: Names in the list of models; None: there is no such list.
        logits: Of the tokens where the answer stands; None: by brightness.
        ids: Of tokens, which ``/tokenize`` tells and ``logprob_token_ids`` asks for; None: it
            knows of neither.
        names: "ids" to name tokens by their ids unless it is told not to; "secret ids": it does
            not tell the ids.
    """

    def __init__(
        self,
        script: Iterable[str | dict[str, Any]] = (),
        *,
        refuses: Mapping[str, str] | None = None,
        held: bool = False,
        listed: tuple[str, ...] | None = (MODEL,),
        logits: dict[str, float] | None = None,
        ids: dict[str, int] | None = None,
        names: str = "",
    ) -> None:
        self.script = list(script)
        self.refuses, self.held, self.listed = refuses or {}, held, listed
        self.logits, self.ids, self.names = logits, ids or {}, names
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_in_flight = 0
        self.answered = 0
        self._in_flight = 0
        self._changed = threading.Condition()
        self._free: set[int] = set()
        self._closed = False
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        """Stop, letting go what is held."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.stop()

    def await_requests(self, count: int, answered: int = 0) -> None:
        """Wait until so many chat requests have come, and so many of them are answered."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.requests) >= count and self.answered >= answered, PATIENT
            ), f"{len(self.requests)} requests, {self.answered} answered"

    def release(self, *numbers: int) -> None:
        """Let these requests go on, counted from 0 as they came; none: all, also later ones."""
        with self._changed:
            self._free |= set(numbers)
            self.held = self.held and bool(numbers)
            self._changed.notify_all()

    def sent(self) -> None:
        """Note an answer."""
        with self._changed:
            self.answered += 1
            self._changed.notify_all()

    def take(self, body: dict[str, Any], key: str | None) -> str | dict[str, Any]:
        """Note a request and hold it if the test wants that; what the script says of it."""
        with self._changed:
            number = len(self.requests)
            self.requests.append(body)
            self.keys.append(key)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self.held or number in self._free or self._closed, PATIENT
            )
            self._in_flight -= 1
            return self.script[number] if number < len(self.script) else "answer"

    def choice(self, body: dict[str, Any], what: str) -> dict[str, Any]:
        """What it answers if the script says so little."""
        if what not in ("answer", "truncated", "broken", "words"):
            return choice(what)
        yes = brightness(pictures(body)[-1])
        sides = {" Yes": yes, " No": 1.0 - yes}
        by_brightness = {side: math.log(p) if p else -math.inf for side, p in sides.items()}
        answer = _position(self.logits or by_brightness)
        said = choice("Answer:" + answer["token"])
        if body.get("logprobs") and what != "words":
            asked, listed = body.get("logprob_token_ids"), answer["top_logprobs"]
            if asked and self.ids:
                listed = listed[:1] + [c for c in listed[1:] if self.ids[c["token"]] in asked]
            else:
                listed = listed[: body["top_logprobs"]]
            answer["top_logprobs"] = listed
            if self.names and body.get("return_tokens_as_token_ids", True):
                for candidate in (answer, *listed):
                    candidate["token"] = f"token_id:{self.ids[candidate['token']]}"
            said["logprobs"] = {"content": [_position("Answer"), _position(":"), answer]}
        return said


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


def _handler(server: EndpointServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if server.listed is None:
                self._send(404, {"detail": "Not Found"})
            else:
                cards = [
                    {"id": name, "object": "model", "root": f"org/{name}"} for name in server.listed
                ]
                self._send(200, {"object": "list", "data": cards})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            if self.path.endswith("/tokenize"):
                known = server.ids if server.names != "secret ids" else {}
                tokens = [known[body["prompt"]]] if body["prompt"] in known else [0, 1]
                self._send(200 if known else 404, {"tokens": tokens})
                return
            what = server.take(body, key)
            refused = [words for field, words in server.refuses.items() if field in body]
            if refused:
                self._send(400, {"error": {"message": refused[0]}})
            elif isinstance(what, dict):
                self._send(200, completion(body, what))
            elif what == "gateway":
                self._send(502, "<html>Bad Gateway</html>", {"Content-Type": "text/html"})
            elif what.isdigit():
                again = {"Retry-After-Ms": "1"} if what == "429" else {}
                self._send(int(what), {"error": {"message": f"no, {key},\nnot now"}}, again)
            elif what.startswith("http://"):
                self._send(307, {}, {"Location": f"{what}/chat/completions"})
            elif what == "page":
                self._send(200, "<html>Welcome</html>", {"Content-Type": "text/html"})
            elif what == "error":
                self._send(200, {"error": {"message": f"overloaded, {key}"}})
            else:
                self._send(200, completion(body, server.choice(body, what)), cut=what)
            server.sent()

        def _send(
            self, status: int, body: Any, headers: dict[str, str] | None = None, cut: str = ""
        ) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            if cut == "broken":
                data = data[: len(data) // 2]
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if cut == "truncated":
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    return Handler


def completion(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, as OpenAI's reference has it."""
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
        "choices": [{"index": 0, **answer}],
    }  # fmt: skip


def choice(
    text: str | None, tokens: Iterable[str | dict[str, float]] | None = None, **more: Any
) -> dict[str, Any]:
    """A choice with this text.

    Args:
        text: The content of the message.
        tokens: Generated tokens, each sure or with the logits of its candidates, the first of the
            greatest being the generated one; None: it has no log-probabilities.
        more: Of the message; ``finish_reason`` of the choice.
    """
    finish_reason = more.pop("finish_reason", "stop")
    message = {"role": "assistant", "content": text, **more}
    logprobs = None if tokens is None else {"content": [_position(token) for token in tokens]}
    return {"message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def _position(token: str | dict[str, float]) -> dict[str, Any]:
    logits = {token: 0.0} if isinstance(token, str) else token
    total = math.log(sum(map(math.exp, logits.values())))
    listed = [{"token": t, "logprob": max(x - total, -9999.0)} for t, x in logits.items()]
    listed.sort(key=lambda candidate: -candidate["logprob"])
    return {**listed[0], "top_logprobs": listed}


def pictures(body: dict[str, Any]) -> list[np.ndarray]:
    """The frames of a request, uint8 ``[H, W, 3]``, of images or of a video as vLLM takes it."""
    urls = [
        part[part["type"]]["url"]
        for part in body["messages"][0]["content"]
        if part["type"] != "text"
    ]
    data = [text for url in urls for text in url.partition(",")[2].split(",")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in data]


def brightness(frame: np.ndarray) -> float:
    return float(frame.max()) / 255
