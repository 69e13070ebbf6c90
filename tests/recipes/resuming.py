"""Short runs that are stopped and resumed, and what is left of them."""

import signal

import pytest
import torch

from recipes.running import cli
from recipes.running.checkpoint import latest
from recipes.running.interruption import Interruption
from recipes.running.metrics import read_rows

SHORT = [
    "--training.total_env_steps=512",
    "--training.warmup_env_steps=96",
    "--training.eval_every_env_steps=256",
    "--training.eval_episodes=2",
    "--training.log_every_env_steps=128",
    "--training.checkpoint_every_env_steps=64",
    "--training.num_envs=4",
    "--training.progress=false",
    "--replay.capacity=300",
]
COLLECTIONS = 16  # of 4 environments x 8 steps


def start(algorithm, folder, *arguments):
    place = [f"--training.log_dir={folder.parent}", f"--training.name={folder.name}"]
    cli.run(algorithm, [*SHORT, *arguments, *place])


def resume(algorithm, folder, *arguments):
    cli.run(algorithm, [*arguments, f"--resume={folder}"])


def stopped(monkeypatch, algorithm, folder, *arguments, after, by=start):
    """Start or resume a run that SIGTERM reaches in its collection number ``after``."""
    asked = []

    def requested(_):
        asked.append(None)
        return signal.SIGTERM if len(asked) == after else 0

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "requested", requested)
        with pytest.raises(SystemExit) as end:
            by(algorithm, folder, *arguments)
    assert end.value.code == 128 + signal.SIGTERM


def last_state(folder):
    """The whole state at the run's end, which is a multiple of its checkpoints' distance."""
    path = latest(folder)
    steps = torch.load(folder / "policy.ckpt", weights_only=True)["env_steps"]
    assert path.name == f"checkpoint-{steps:012d}"
    (file,) = path.rglob("state.pt")
    state = torch.load(file, weights_only=True)
    for timed in ("seconds", "written"):  # rows hold clips/s, whose digits vary
        del state["telemetry"][timed]
    return state


def curves(folder):
    """Its rows without what depends on the machine's speed."""
    timed = ("seconds", "speed/", "time/", "scoring/clips_per_s", "scoring/latency_")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in read_rows(folder)
    ]


def assert_equal(one, other, path="state"):
    """Bit for bit; says where two states differ."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert list(one) == list(other), path
        for name in one:
            assert_equal(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{path}.{i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert one.shape == other.shape, path
        same = one.numpy().tobytes() == other.numpy().tobytes()
        assert same, f"{path}: {(one != other).sum()} of {one.numel()} differ"
    else:
        assert one == other, f"{path}: {one} and {other}"


def assert_same_end(one, other):
    assert_equal(curves(one), curves(other), "rows")
    assert_equal(last_state(one), last_state(other))
    weights = (torch.load(f / "policy.ckpt", weights_only=True) for f in (one, other))
    assert_equal(*weights)
