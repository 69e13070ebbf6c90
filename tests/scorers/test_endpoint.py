"""A served judge, against a loopback server that goes wrong on purpose. Nobody sleeps here."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from tests.scorers.distributions import DISTRIBUTIONS
from tests.scorers.endpoint_server import (
    MODEL,
    PATIENT,
    EndpointServer,
    brightness,
    choice,
    pictures,
)
from tests.scoring_doubles import NumberRenderer
from tests.streams import stream
from vlmrb_torchrl import (
    AsyncScorer,
    ClipRenderTransform,
    VLMPrioritizedSampler,
    VLMReplayBuffer,
)
from vlmrb_torchrl.scorers import EndpointScorer, ScorerUnavailableError
from vlmrb_torchrl.scorers.endpoint import RequestRefusedError
from vlmrb_torchrl.scoring import choose_mode

SECRET = "sk-very-secret-4711"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No proxy, no key of the user's, no pauses between repeats."""
    proxies = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]
    for name in (*proxies, *map(str.upper, proxies), "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)


@pytest.fixture
def serve():
    servers = []

    def start(*script, **settings):
        servers.append(EndpointServer(script, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def some_clips(*greys, frames=3):
    """One clip per grey level: black frames, the last one of that level."""
    clips = torch.zeros(len(greys), frames, 3, 8, 8, dtype=torch.uint8)
    clips[:, -1] = torch.tensor(greys, dtype=torch.uint8)[:, None, None, None]
    return TensorDict({"clip": clips}, [len(greys)])


def judge(server, **settings):
    return EndpointScorer(server.url, MODEL, "Yes or No?", **settings)


def score(scorer, clips):
    return scorer(clips.clone())["score"].tolist()


def fault(scorer, clips, kind):
    """The message of the error that scoring raises, which is one line and names the server."""
    with pytest.raises(kind) as error:
        scorer(clips.clone())
    assert type(error.value) is kind or kind is RuntimeError
    assert "\n" not in str(error.value)
    assert scorer.base_url in str(error.value) or MODEL in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- what is asked, what is read


def test_the_score_is_the_servers_probability_of_yes(serve):
    """P(Yes) is the brightness of the last frame, P(No) the rest; a sure answer has no other."""
    greys = [0, 51, 102, 204, 255]
    assert score(judge(serve()), some_clips(*greys)) == pytest.approx([g / 255 for g in greys])


def test_a_request_shows_the_frames_in_order_and_then_asks(serve):
    server = serve()
    scorer = judge(server, frames=2, max_tokens=5, top_logprobs=7, extra_body={"seed": 1})
    score(scorer, some_clips(200, frames=4))
    request = server.requests[-1]
    assert request["model"] == MODEL
    assert request["temperature"] == 0
    assert (request["max_tokens"], request["top_logprobs"]) == (5, 7)
    assert request["logprobs"] is True
    assert request["seed"] == 1
    parts = request["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert parts[-1]["text"] == "Yes or No?"
    assert [brightness(frame) * 255 for frame in pictures(request)] == [0, 200]


@pytest.mark.parametrize("media", ["images", "video"])
def test_png_frames_arrive_as_they_were(serve, media):
    server = serve()
    clips = torch.randint(0, 256, (1, 3, 3, 8, 6), dtype=torch.uint8)
    judge(server, media=media)(TensorDict({"clip": clips}, [1]))
    arrived = np.stack(pictures(server.requests[-1]))
    assert np.array_equal(arrived, clips[0].permute(0, 2, 3, 1).numpy())


def test_a_video_is_one_part_with_its_number_of_frames(serve):
    """vLLM would leave out what comes after the 32nd frame of a video of unknown length."""
    server = serve()
    score(judge(server, media="video", fps=4.0), some_clips(100, frames=40))
    request = server.requests[-1]
    assert [part["type"] for part in request["messages"][0]["content"]] == ["video_url", "text"]
    assert request["media_io_kwargs"] == {"video": {"num_frames": 40, "fps": 4.0}}
    assert len(pictures(request)) == 40


def test_frames_are_enlarged_pixel_by_pixel_and_nearly_the_same_in_jpeg(serve):
    server = serve()
    clips = torch.randint(0, 256, (1, 1, 3, 4, 4), dtype=torch.uint8)
    judge(server, upscale=3)(TensorDict({"clip": clips}, [1]))
    large = clips[0].repeat_interleave(3, -1).repeat_interleave(3, -2)
    assert np.array_equal(pictures(server.requests[-1])[0], large[0].permute(1, 2, 0).numpy())
    close = pytest.approx([200 / 255], abs=0.02)
    assert score(judge(server, image_format="jpeg"), some_clips(200)) == close
    assert "data:image/jpeg;base64," in str(server.requests[-1])


def test_a_frame_is_encoded_once_a_batch(serve, monkeypatch):
    from vlmrb_torchrl.scorers import endpoint

    seen = []
    encode = endpoint.picture
    monkeypatch.setattr(
        endpoint, "picture", lambda frame, *rest: seen.append(frame) or encode(frame, *rest)
    )
    server = serve()
    scorer = EndpointScorer(server.url, MODEL, ["One?", "Two?"])
    scorer.load()
    seen.clear()
    score(scorer, some_clips(10, 20, 10, frames=5))
    assert len(seen) == 3  # black, 10 and 20
    assert len(server.requests) == 1 + 3 * 2


def test_every_prompt_is_asked_and_the_greatest_counts(serve):
    server = serve()
    scorer = EndpointScorer(server.url, MODEL, ["One?", "Two?"])
    assert scorer.score_prompts(some_clips(51, 255)).tolist() == [
        pytest.approx([0.2, 0.2]),
        [1.0, 1.0],
    ]
    asked = [request["messages"][0]["content"][-1]["text"] for request in server.requests[1:]]
    assert sorted(asked) == ["One?", "One?", "Two?", "Two?"]


# ---------------------------------------------------------------- at once, and in which order


def test_answers_that_come_in_reverse_stay_with_their_clips(serve):
    greys = [10, 60, 110, 160, 210]
    server = serve()
    scorer = judge(server, concurrency=5)
    scorer.load()
    server.held = True
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(score, scorer, some_clips(*greys))
        server.await_requests(6)
        for done, number in enumerate(range(5, 0, -1), start=1):
            server.release(number)
            server.await_requests(6, answered=1 + done)
        assert answers.result(PATIENT) == pytest.approx([g / 255 for g in greys])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(serve, concurrency):
    """Answered one by one: a client without a bound would have all ten waiting by then."""
    server = serve()
    scorer = judge(server, concurrency=concurrency)
    scorer.load()
    server.held = True
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(score, scorer, some_clips(*range(10)))
        for number in range(1, 11):
            server.await_requests(min(number + concurrency, 11), answered=number)
            server.release(number)
        assert len(answers.result(PATIENT)) == 10
    assert server.most_in_flight == concurrency


def test_it_works_where_a_loop_runs_already(serve):
    """As in a notebook."""
    scorer = judge(serve())

    async def cell():
        return score(scorer, some_clips(255))

    assert asyncio.run(cell()) == [1.0]


def test_no_thread_and_no_connection_is_left(serve):
    server = serve("answer", "503", "503")
    scorer = judge(server, retries=0)
    scorer.load()
    fault(scorer, some_clips(*range(6)), ScorerUnavailableError)
    score(scorer, some_clips(*range(6)))
    connections = psutil.Process().net_connections("tcp")
    assert not [c for c in connections if c.raddr and c.raddr.port == server.port]
    assert not [t for t in threading.enumerate() if t.name.startswith(("asyncio", "AnyIO"))]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("how", ["500", "503", "429", "408", "truncated"])
def test_what_passes_is_asked_again(serve, how):
    server = serve("answer", how, how, how)
    assert score(judge(server), some_clips(51)) == pytest.approx([0.2])
    assert len(server.requests) == 1 + 4


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("503", "answers 503 (no, Bearer none, not now)"),
        ("429", "answers 429"),
        ("truncated", "cannot be reached"),
        ("broken", "broken JSON"),
    ],
)
def test_what_does_not_pass_makes_it_unavailable(serve, how, words):
    scorer = judge(serve("answer", *[how] * 8), retries=1)
    assert words in fault(scorer, some_clips(51), ScorerUnavailableError)


def test_an_error_of_the_server_that_stays_is_laid_to_the_request(serve):
    """It may be this request that breaks the server: asked for ever, it would block the others."""
    scorer = judge(serve("answer", *["500"] * 2), retries=1)
    assert "answers 500" in fault(scorer, some_clips(51), RequestRefusedError)


def test_a_server_that_is_down_is_unavailable_and_then_answers(serve):
    server = serve()
    scorer = judge(server)
    server.stop()
    message = fault(scorer, some_clips(51), ScorerUnavailableError)
    assert "cannot be reached (All connection attempts failed): start the server" in message
    server.start()
    assert score(scorer, some_clips(51)) == pytest.approx([0.2])


def test_a_server_that_hangs_is_given_up_in_time(serve):
    server = serve()
    scorer = judge(server, timeout_s=0.2)
    scorer.load()
    server.held = True
    message = fault(scorer, some_clips(51), ScorerUnavailableError)
    assert "within 0.2 s: raise timeout_s" in message


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("401", "environment variable OPENAI_API_KEY"),
        ("403", "environment variable OPENAI_API_KEY"),
        ("404", "must be a name that it serves"),
        ("413", "lower frames"),
    ],
)
def test_a_refusal_is_not_repeated_and_has_a_remedy(serve, status, remedy):
    server = serve("answer", *[status] * 3)
    clips = some_clips(*range(1 if status == "413" else 20))  # of the key or model: no more asked
    message = fault(judge(server, concurrency=1), clips, RuntimeError)
    assert f"answers {status} (no, Bearer none, not now): " in message
    assert remedy in message
    assert len(server.requests) <= 3


@pytest.mark.parametrize(
    ("what", "words", "remedy"),
    [
        ("page", "<html>", "/v1"),
        ("error", "overloaded", "/v1"),
        ("I cannot tell", "'I cannot tell', neither Yes nor No", "max_tokens"),
    ],
)
def test_what_is_no_answer_is_quoted(serve, what, words, remedy):
    message = fault(judge(serve("answer", what)), some_clips(51), RuntimeError)
    assert words in message
    assert remedy in message


@pytest.mark.parametrize(
    ("words", "remedy", "about_frames"),
    [
        ("At most 8 image(s) may be provided in one prompt.", "lower frames", True),
        ("This model's maximum context length is 4096 tokens.", "lower frames", True),
        ("At most 0 video(s) may be provided in one prompt.", "media='images'", True),
        ("reasoning_effort must be low", "extra_body", False),
        ("seed: Input should be a valid integer", "extra_body", False),
    ],
)
def test_the_remedy_of_a_refusal_is_for_what_the_server_names(serve, words, remedy, about_frames):
    scorer = judge(serve(refuses={"model": words}))
    message = fault(scorer, some_clips(51), RequestRefusedError)
    assert f"answers 400 ({words}): " in message
    assert remedy in message
    assert ("frames" in message) == about_frames


@pytest.mark.parametrize(
    ("what", "words"), [("400", "answers 400"), ("I cannot tell", "'I cannot tell'")]
)
def test_a_clip_that_gets_no_number_costs_no_other_one(serve, caplog, what, words):
    """Of 16 clips the third and the fifth get none; one warning says so.

    A clip asked about without log-probabilities might pass, but no later one would have any.
    """
    greys = range(0, 240, 15)
    server = serve("answer", "answer", "answer", what, "answer", what)
    scorer = judge(server, concurrency=1)
    scores = scorer.score_prompts(some_clips(*greys))[:, 0].tolist()
    assert all("logprobs" in request for request in server.requests)
    expected = [math.nan if k in (2, 4) else grey / 255 for k, grey in enumerate(greys)]
    assert scores == pytest.approx(expected, nan_ok=True)
    assert len(server.requests) == 1 + 16
    assert len(warnings_of(caplog)) == 1
    assert words in warnings_of(caplog)[0].getMessage()


def test_an_outage_within_a_batch_is_none_of_a_clip(serve):
    """Or a restart of the server would cost the clips that it met."""
    scorer = judge(serve("answer", "answer", "400", *["503"] * 20), concurrency=1, retries=0)
    fault(scorer, some_clips(*range(16)), ScorerUnavailableError)


@pytest.mark.parametrize("package", ["openai", "PIL.Image"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package} .*vlmrb-torchrl\[endpoint\]"):
        EndpointScorer("http://localhost/v1", MODEL).load()


# ---------------------------------------------------------------- without log-probabilities


def warnings_of(caplog):
    return [r for r in caplog.records if r.name.startswith("vlmrb_torchrl")]


@pytest.mark.parametrize("how", ["words", "refuses"])
def test_without_logprobs_the_answer_counts_and_one_warning_says_so(serve, caplog, how):
    """At 127 of 255 the server says No, at 128 Yes."""
    refuses = {} if how == "words" else {"logprobs": "logprobs is not supported"}
    server = serve(*["words"] * 5 if how == "words" else [], refuses=refuses)
    scorer = judge(server)
    assert score(scorer, some_clips(0, 127, 128, 255)) == [0.0, 0.0, 1.0, 1.0]
    assert len(warnings_of(caplog)) == 1
    message = warnings_of(caplog)[0].getMessage()
    assert "no log-probabilities" in message
    assert "1.0 for Yes and 0.0 for No" in message
    assert ("logprobs is not supported" in message) == (how == "refuses")


def test_the_revision_tells_words_from_probabilities(serve):
    """Or a cache would mix them: the same server may be asked before and after an update."""
    for refuses, what in (({}, "logprobs"), ({"logprobs": "no logprobs"}, "words")):
        scorer = judge(server := serve(refuses=refuses))
        assert scorer.revision == ""
        scorer.load()
        assert scorer.revision == f"org/{MODEL} {what}"
        if refuses:  # it is not asked for them again
            score(scorer, some_clips(*range(4)))
            assert sum("logprobs" in request for request in server.requests) == 1
            assert len(server.requests) == 2 + 4


IDS = {" Yes": 9454, " No": 2753, " Unclear": 7}


def test_tokens_that_are_named_by_ids_are_read_where_the_server_tells_the_ids(serve):
    """P(Yes) / P(No) = e^-0.70 / e^-0.69: 1 / (1 + e^0.01)."""
    scorer = judge(serve(logits={" No": -0.69, " Yes": -0.70}, ids=IDS, names="ids"))
    assert score(scorer, some_clips(51)) == pytest.approx([1 / (1 + math.exp(0.01))])
    assert scorer.revision.endswith(" logprobs")


def test_tokens_that_nobody_can_name_leave_the_words_and_a_warning_says_so(serve, caplog):
    scorer = judge(serve(logits={" No": -0.69, " Yes": -0.70}, ids=IDS, names="secret ids"))
    assert score(scorer, some_clips(51, 52)) == [0.0, 0.0]
    assert ["no log-probabilities" in r.getMessage() for r in warnings_of(caplog)] == [True]
    assert scorer.revision.endswith(" words")


def test_yes_and_no_are_asked_for_by_their_ids_however_unlikely_they_are(serve):
    """P(Yes) = 3 P(No), behind a likelier word; a list of one candidate would hold neither."""
    logits = {" Unclear": 9.0, " Yes": math.log(3), " No": 0.0}
    server = serve(logits=logits, ids=IDS)
    assert score(judge(server, top_logprobs=1), some_clips(51)) == pytest.approx([0.75])
    assert [request["logprob_token_ids"] for request in server.requests] == [[2753, 9454]] * 2


def test_a_server_that_refuses_ids_is_asked_for_candidates_from_then_on(serve, caplog):
    server = serve(ids=IDS, refuses={"logprob_token_ids": "logprob_token_ids: not permitted"})
    assert score(judge(server), some_clips(51, 102)) == pytest.approx([0.2, 0.4])
    assert [r.get("logprob_token_ids") for r in server.requests] == [[2753, 9454], *[None] * 3]
    assert not warnings_of(caplog)


@pytest.mark.parametrize("by_ids", [False, True])
def test_a_distribution_over_the_answers_token_means_one_score(serve, by_ids):
    """Whether the server lists the likeliest candidates or those asked for."""
    tokens = dict.fromkeys(token for logits, _ in DISTRIBUTIONS.values() for token in logits)
    server = serve(ids={token: k for k, token in enumerate(tokens)} if by_ids else None)
    scorer, scores = judge(server), {}
    for name, (server.logits, _) in DISTRIBUTIONS.items():
        scores[name] = score(scorer, some_clips(51))[0]
    assert scores == pytest.approx({name: right for name, (_, right) in DISTRIBUTIONS.items()})


# ---------------------------------------------------------------- dialects


@pytest.mark.parametrize(
    ("refuses", "left_out", "instead", "warned"),
    [
        (
            {"max_tokens": "Unsupported parameter. Use 'max_completion_tokens' instead."},
            {"max_tokens"},
            {"max_completion_tokens": 8},
            "",
        ),
        (
            {
                "max_tokens": "Unsupported parameter. Use 'max_completion_tokens' instead.",
                "temperature": "'temperature' does not support 0 with this model.",
                "logprobs": "You are not allowed to request logprobs from this model.",
            },
            {"max_tokens", "temperature", "logprobs", "top_logprobs"},
            {"max_completion_tokens": 8},
            "temperature of its own",
        ),
        (
            {"media_io_kwargs": "media_io_kwargs is not supported"},
            {"media_io_kwargs"},
            {},
            "media='images'",
        ),
    ],
)
def test_a_server_of_another_dialect_is_asked_in_it_and_from_then_on(
    serve, caplog, refuses, left_out, instead, warned
):
    """At 102 of 255 the server says No, at 204 Yes, with or without log-probabilities."""
    server = serve(refuses=refuses)
    scores = score(judge(server, media="video"), some_clips(102, 204))
    assert [round(each) for each in scores] == [0, 1]
    assert len(server.requests) == len(refuses) + 1 + 2
    for request in server.requests[-3:]:
        assert not left_out & request.keys()
        assert instead.items() <= request.items()
    assert any(warned in r.getMessage() for r in warnings_of(caplog)) == bool(warned)


# ---------------------------------------------------------------- thoughts

NO_AT_LAST = {" No": math.log(3), " Yes": 0.0}
THOUGHTS = ["<think>", "Answer", ":", " Yes", "?", "</think>", "\n\n"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (choice("<think>Answer: Yes?</think>\n\nAnswer: No"), 0.0),
        (choice("<think>Answer: Yes?</think>\n\nNo", [*THOUGHTS, NO_AT_LAST, "<|im_end|>"]), 0.25),
        (choice("No", [*THOUGHTS, NO_AT_LAST, "<|im_end|>"], reasoning="Answer: Yes?"), 0.25),
        (choice("No", [*THOUGHTS, NO_AT_LAST], reasoning_content="Answer: Yes?"), 0.25),
        (choice("No", [*THOUGHTS, "No", "</s>"]), 0.0),
        (choice([{"type": "thinking", "thinking": []}, {"type": "text", "text": "Yes"}]), 1.0),
        (choice(None, THOUGHTS[:4], reasoning="Answer: Yes", finish_reason="length"), None),
        (choice("<think>Answer: Yes", THOUGHTS[:4], finish_reason="length"), None),
        (choice("Hm, Answer: Yes", THOUGHTS[1:4], finish_reason="length"), None),
    ],
)
def test_an_answer_is_read_behind_the_thoughts(serve, said, expected):
    scorer = judge(serve("answer", said))
    if expected is None:
        assert "raise max_tokens" in fault(scorer, some_clips(51), RuntimeError)
    else:
        assert score(scorer, some_clips(51)) == pytest.approx([expected])


# ---------------------------------------------------------------- proxies


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_this_machine_is_asked_directly_whatever_the_proxy(serve, monkeypatch, host):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "nonsense://")
    scorer = EndpointScorer(f"http://{host}:{serve().port}/v1", MODEL)
    assert score(scorer, some_clips(51)) == pytest.approx([0.2])


def test_a_proxy_that_does_not_lead_to_the_server_is_named(serve, monkeypatch):
    """Before the first answer from the server it is an error, afterwards an outage to wait for."""
    proxy = serve(*["gateway"] * 3, "answer", "answer", "gateway", "503")
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    scorer = EndpointScorer("http://judge.invalid/v1", MODEL, retries=0)
    for _ in range(3):
        message = fault(scorer, some_clips(51), RequestRefusedError)
        assert "HTTP_PROXY" in message
        assert "add judge.invalid to NO_PROXY" in message
    assert score(scorer, some_clips(51)) == pytest.approx([0.2])
    assert "HTTP_PROXY" in fault(scorer, some_clips(51), ScorerUnavailableError)
    assert "HTTP_PROXY" not in fault(scorer, some_clips(51), ScorerUnavailableError)


def test_a_proxy_that_does_not_lead_to_a_server_behind_tls_is_named(serve, monkeypatch):
    """It cannot answer in the server's place: it refuses the tunnel."""
    monkeypatch.setenv("HTTPS_PROXY", serve().url.removesuffix("/v1"))
    scorer = EndpointScorer("https://judge.invalid/v1", MODEL, retries=0)
    assert "HTTPS_PROXY" in fault(scorer, some_clips(51), RequestRefusedError)


def test_a_proxy_that_is_down_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    scorer = EndpointScorer("http://judge.invalid/v1", MODEL, retries=0)
    message = fault(scorer, some_clips(51), ScorerUnavailableError)
    assert "ALL_PROXY" in message
    assert "judge.invalid to NO_PROXY" in message


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize("fault", ["401", "500", "error"])
def test_the_key_reaches_the_server_and_nothing_else(serve, monkeypatch, caplog, fault):
    """Not the logs of any package at DEBUG, not the object, not an error in which it is echoed."""
    monkeypatch.setenv("JUDGE_KEY", SECRET + "\n")
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    server = serve("answer", "answer", fault)
    scorer = judge(server, api_key_variable="JUDGE_KEY", retries=0)
    score(scorer, some_clips(51))
    with pytest.raises(RuntimeError) as error:
        scorer(some_clips(51))
    assert set(server.keys) == {f"Bearer {SECRET}"}
    written = "".join(traceback.format_exception(error.value))
    assert "***" in written
    for text in (written, caplog.text, repr(scorer), str(vars(scorer)), str(scorer.config)):
        assert SECRET not in text
    assert SECRET.encode() not in pickle.dumps(scorer)
    assert len(caplog.records) > 2  # they did log


def test_a_key_that_http_cannot_carry_is_refused_without_showing_it(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX-Injected: 1")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        judge(serve()).load()
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_the_key_does_not_follow_a_redirect_to_another_host(serve, monkeypatch):
    """Another port is another origin to HTTP, as another host is."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    other = serve()
    first = serve("answer", other.url)
    scorer = judge(first)
    score(scorer, some_clips(51))
    assert first.keys == [f"Bearer {SECRET}"] * 2
    assert other.keys == [None]


# ---------------------------------------------------------------- construction and loading


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": f"http://me:{SECRET}@host/v1"}, "OPENAI_API_KEY"),
        ({"base_url": f"me:{SECRET}@host/v1"}, "OPENAI_API_KEY"),
        ({"base_url": f"http://host/v1?key={SECRET}"}, "OPENAI_API_KEY"),
        ({"api_key_variable": SECRET}, "api_key_variable"),
    ],
)
def test_what_may_be_a_secret_is_refused_without_showing_it(settings, words):
    with pytest.raises(ValueError, match=r".+") as error:
        EndpointScorer(**{"base_url": "http://localhost/v1", "model": MODEL, **settings})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


def test_loading_asks_once_about_a_black_frame(serve):
    server = serve()
    scorer = judge(server)
    assert scorer.score_prompts(some_clips()).shape == (0, 1)
    assert server.requests == []
    scorer.load()
    scorer.load()
    score(scorer.asking("Is it dark?"), some_clips(51))
    assert len(server.requests) == 2
    assert [frame.max() for frame in pictures(server.requests[0])] == [0]


@pytest.mark.parametrize(("listed", "warned"), [((MODEL, "b"), 0), (("b", "c"), 1), (None, 0)])
def test_a_model_that_the_server_does_not_list_is_warned_about(serve, caplog, listed, warned):
    """Some servers answer for any name; some list only part of what they serve, or nothing."""
    judge(serve(listed=listed)).load()
    assert len(warnings_of(caplog)) == warned
    assert all("b, c" in record.getMessage() for record in warnings_of(caplog))


def test_what_was_learnt_stays_behind_when_it_travels(serve):
    server = serve()
    scorer = judge(server)
    scorer.load()
    again = pickle.loads(pickle.dumps(scorer))
    assert again.config == scorer.config
    assert again.revision == ""
    assert score(again, some_clips(51)) == pytest.approx([0.2])


def test_every_setting_that_changes_a_score_is_in_the_configuration(monkeypatch):
    base = EndpointScorer("http://localhost/v1", MODEL)
    without = base.fingerprint
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert base.fingerprint == without
    for settings in (
        {"frames": 8},
        {"max_tokens": 2},
        {"top_logprobs": 5},
        {"image_format": "jpeg"},
        {"upscale": 2},
        {"media": "video"},
        {"fps": 2.0},
        {"extra_body": {"seed": 1}},
    ):
        other = EndpointScorer("http://localhost/v1", MODEL, **settings)
        assert other.fingerprint != base.fingerprint
    same = EndpointScorer(
        "http://localhost/v1", MODEL, concurrency=2, timeout_s=9.0, retries=0, api_key_variable="K"
    )
    assert same.fingerprint == base.fingerprint


def test_a_worker_of_its_own_encodes_the_pictures():
    """PNG costs the interpreter milliseconds a batch, which the learner would miss."""
    assert choose_mode("auto", EndpointScorer("http://localhost/v1", MODEL)) == "process"


# ---------------------------------------------------------------- an outage while learning


@pytest.mark.parametrize("mode", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_an_outage_delays_scores_and_loses_none(serve, mode):
    """Clips of 4, state k drawn as grey k; down while the last 8 of 10 clips come in."""
    server = serve()
    buffer = VLMReplayBuffer(
        storage=LazyTensorStorage(64),
        sampler=VLMPrioritizedSampler(64, threshold=None),
        batch_size=4,
    )
    with AsyncScorer(
        buffer,
        ClipRenderTransform(NumberRenderer()),
        judge(server, retries=0),
        mode=mode,
        clip_transitions=4,
        frames_per_clip=2,
        batch_clips=2,
        max_wait_s=0.0,
        backoff_s=(0.01, 0.05),
        niceness=0,
    ) as scoring:
        scoring.extend(stream([8]))
        assert scoring.drain(PATIENT)
        server.stop()
        for start in (100, 116):
            scoring.extend(stream([16], start=start))
        while scoring.statistics()["faults_unavailable"] < 5:
            assert not scoring.drain(0.05)  # waits for what cannot come
        figures = scoring.statistics()
        assert len(buffer) == 40  # what is inserted is in the buffer, scored or not
        assert (figures["clips_scored"], figures["clips_pending"]) == (2, 8)
        server.start()
        assert scoring.drain(PATIENT)
        figures = scoring.statistics()
    assert figures["clips_submitted"] == figures["clips_scored"] == 10
    assert figures["clips_dropped"] == figures["clips_failed"] == figures["clips_late"] == 0
    lasts = [4, 8, *range(104, 133, 4)]
    expected = [grey / 255 for grey in lasts for _ in range(4)]
    assert buffer.sampler.state_dict()["_score"][:40].tolist() == pytest.approx(expected, abs=1e-6)
