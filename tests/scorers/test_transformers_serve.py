"""A judge served by ``transformers serve``, which no one here wrote, against the same judge here.

The server is pinned to the embedded judge's folder. It takes several images a message as data
URIs; it ignores the request for log-probabilities, lists no models of a folder, and of a video it
wants the sound. So what is tested is the reading of words.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
from tensordict import TensorDict

from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.renderers import MiniGridRenderer
from vlmrb_torchrl.scorers import EmbeddedJudge, EndpointScorer
from vlmrb_torchrl.scorers.embedded import FOLDER, TILE_SIZE, WINDOW

pytestmark = pytest.mark.slow  # the server takes ten seconds to start
for package in ("accelerate", "fastapi", "openai", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} of transformers[serving] is not installed")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The running server's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = f"serve {FOLDER} --host 127.0.0.1 --port {port} --device cpu --dtype float32"
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", *command.split()],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("hub")),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in server.stdout:
        said.append(line)
        if "Uvicorn running on" in line:
            break
    else:
        pytest.fail("transformers serve ended:\n" + "".join(said[-20:]))
    # What it says from now on must go somewhere, or it stops at a full pipe.
    threading.Thread(target=server.stdout.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="module")
def clips():
    """Eight frames each, of 16 demonstrated games: before, at and after each kind of event."""
    env = DoorKeyEnv(6, 16, seed=0)
    played = env.rollout(40, env.demonstrator(), break_when_any_done=False)
    events = played["next", "events"]
    states = played["next", "render_state"]
    ends = [
        (game, step + after)
        for kind in range(events.shape[-1])
        for game, step in events[:, 8:-4, kind].nonzero()[:4].add(torch.tensor([0, 8])).tolist()
        for after in (-1, 0, 3)
    ]
    render = MiniGridRenderer(TILE_SIZE, WINDOW)
    shown = torch.stack([render(states[game, step - 7 : step + 1]) for game, step in ends])
    return TensorDict({"clip": shown}, [len(shown)])


def test_the_served_judge_says_what_the_same_judge_says_here(url, clips, caplog):
    """Every clip under every question; both answers occur for each."""
    here = EmbeddedJudge(tuple(MINIGRID)).score_prompts(clips) >= 0.5
    scorer = EndpointScorer(url, str(FOLDER), list(MINIGRID.values()), max_tokens=1)
    served = scorer.score_prompts(clips)
    assert torch.equal(served, here.float())
    assert here.any(0).all()
    assert not here.all(0).any()
    assert len([r for r in caplog.records if r.name == "vlmrb_torchrl.scorers"]) == 1
    assert "gives no log-probabilities" in caplog.text
    assert scorer.revision.endswith(" words")


def test_another_model_is_refused_in_the_servers_words(url, clips):
    with pytest.raises(RuntimeError, match=r"answers 400 \(Server is pinned to .*other") as error:
        EndpointScorer(url, "other").score_prompts(clips)
    assert "\n" not in str(error.value)


def test_an_answer_that_runs_on_is_none(url, clips):
    """The embedded judge knows no end: "NoNoNo" is no word. Real models stop by themselves."""
    with pytest.raises(RuntimeError, match="neither Yes nor No"):
        EndpointScorer(url, str(FOLDER), max_tokens=4).score_prompts(clips)
