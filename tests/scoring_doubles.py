"""Scorers that a test holds by a gate or lets misbehave; importable by worker processes."""

import os
import select
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from tensordict.nn import TensorDictModuleBase

from vlmrb_torchrl.scorers import ClipScorer, ScorerUnavailableError


class Gate:
    """Two pipes with names: who passes says so and waits; the test lets one or all through."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(folder / name) for name in ("arrived", "released")]
        for path in self.paths:
            os.mkfifo(path)
        self._open()

    def _open(self):
        # Read and write: opening blocks nobody, and what is written waits for its reader.
        self._arrived, self._released = (os.open(path, os.O_RDWR) for path in self.paths)

    def __getstate__(self):
        return self.paths

    def __setstate__(self, paths):
        self.paths = paths
        self._open()

    def pass_through(self):
        os.write(self._arrived, b"x")
        os.read(self._released, 1)

    def await_arrival(self, timeout_s=60.0):
        ready, _, _ = select.select([self._arrived], [], [], timeout_s)
        assert ready, "nobody came to the gate"
        os.read(self._arrived, 1)

    def release(self, times=1):
        os.write(self._released, b"x" * times)


class Forked(subprocess.Popen):
    """A worker process that is a fork of the tests' own, which has imported torch already."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            os.close(self._devnull)
            return
        code = 0
        try:
            (pipe,) = pass_fds
            os.closerange(3, pipe)
            os.closerange(pipe + 1, 1024)
            os.environ.update(env)
            sys.argv = args[2:]
            exec(args[2], {})
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)


class Yes(ClipScorer):
    """Says Yes."""

    def __init__(self):
        super().__init__(in_keys=())

    def score(self, tensordict):
        return torch.ones(tensordict.shape[0])


class Gated(Yes):
    """Says Yes as soon as it may pass."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def score(self, tensordict):
        self.gate.pass_through()
        return super().score(tensordict)


class Brightness(ClipScorer):
    """The brightest pixel of the last frame, of 255."""

    def score(self, tensordict):
        return tensordict["clip"][:, -1].flatten(1).amax(1) / 255


class ThirdIs(Brightness):
    """Answers so (None: raises) for the clip whose last outcome is 12; keeps the batches' sizes."""

    def __init__(self, answer, folder):
        super().__init__()
        self.answer, self.log = answer, Path(folder) / "sizes"

    def score(self, tensordict):
        scores = super().score(tensordict)
        with self.log.open("a") as file:
            file.write(f"{len(scores)} ")
        third = scores * 255 == 12
        if self.answer is None and third.any():
            raise RuntimeError("one of them")
        return scores.masked_fill(third, self.answer or 0.0)


class Faulty(Yes):
    """Behaves as its script says, call by call, then says Yes.

    Calls are counted in a file, so that a restarted process goes on counting.
    """

    def __init__(self, script, folder, in_load=False):
        super().__init__()
        self.script, self.in_load = script, in_load
        self.log = Path(folder) / "calls"

    def _next(self):
        with self.log.open("a") as file:
            file.write("x")
        calls = len(self.log.read_text())
        return self.script[calls - 1] if calls <= len(self.script) else "works"

    def load(self):
        if self.in_load:
            self._behave(self._next(), 1)

    def score(self, tensordict):
        how = "works" if self.in_load else self._next()
        return self._behave(how, tensordict.shape[0])

    def _behave(self, how, B):
        match how:
            case "works":
                return torch.ones(B)
            case "raises":
                raise RuntimeError("no\nluck")
            case "is unavailable":
                raise ScorerUnavailableError("the server\nis down")
            case "breaks its GPU":
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
            case "exits":
                os._exit(3)
            case "leaves":
                raise SystemExit
            case "hangs":
                select.select([], [], [])
            case "answers NaN":
                return torch.full((B,), torch.nan)
            case "answers 2":
                return torch.full((B,), 2.0)
            case "answers one too many":
                return torch.ones(B + 1)
        raise AssertionError(how)


class Foreign(TensorDictModuleBase):
    """A scorer that is no ClipScorer: any TensorDictModule goes. Answers as told, ``[B, 1]``."""

    def __init__(self, answer):
        super().__init__()
        self.in_keys, self.out_keys = [], ["score"]
        self.answer = answer

    def forward(self, tensordict):
        return tensordict.set("score", torch.full((tensordict.shape[0], 1), self.answer))


class NumberRenderer:
    """Draws the state [.., 1] as one grey level: state k is k mod 256."""

    def __call__(self, render_state):
        grey = (render_state % 256).to(torch.uint8)
        return grey[..., None, None].expand(*render_state.shape[:-1], 3, 2, 2).contiguous()
