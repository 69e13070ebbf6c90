"""Each benchmark runs, small, and prints its table; the figures themselves are not tested."""

import copy
from importlib import import_module

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import PrioritizedSampler, RandomSampler, TensorDictReplayBuffer

from recipes.arguments import program
from recipes.benchmarks import (
    environment,
    peers,
    rendering,
    sampler,
    scene,
    scoring,
    soak,
    training,
    update,
)
from recipes.benchmarks.timing import Spread
from recipes.benchmarks.torchrl_replay import TorchRLPrioritized
from recipes.dqn import DQN
from recipes.replay import Prioritized
from recipes.running import cli
from tests.recipes.chain import batch, learner
from vlmrb_torchrl import VLMPrioritizedSampler

SCENE = "scene-singletask-task1-v0"


def test_ratio_is_taken_round_by_round():
    # 10/5, 20/5, 30/60: the median of (2, 4, 0.5) is 2, while the ratio of the medians is 4.
    ratio = Spread([10, 20, 30]) / Spread([5, 5, 60])
    assert list(ratio.samples) == [2, 4, 0.5]
    assert str(ratio) == "2.00 (0.50 to 4.00)"


@pytest.mark.parametrize("peer", ["torchrl_uniform", "torchrl_per"])
def test_peers_are_torchrl_s_own_buffer_and_samplers(peer):
    parser = cli.build_parser(DQN)
    config = parser.parse_args([f"--config={training.PEERS / peer}.yaml"])
    buffer = parser.instantiate(config).replay.buffer(0)
    assert type(buffer) is TensorDictReplayBuffer
    sampler = {"torchrl_uniform": RandomSampler, "torchrl_per": PrioritizedSampler}[peer]
    assert type(buffer.sampler) is sampler


def test_per_draws_as_torchrl_s_own_and_weighs_in_proportion():
    """On one history of |δ|, some of it beyond the ring's end: P = (|δ| + ε)^α / Σ (|δ| + ε)^α.

    A slot never learnt from has the greatest |δ| seen before it was written, and at least 1.
    TorchRL's weights are divided by the greatest, in single precision.
    """
    settings = {"capacity": 16, "alpha": 0.7, "beta_start": 0.4, "td_error_offset": 0.01}
    methods = Prioritized(batch_size=8, **settings), TorchRLPrioritized(batch_size=8, **settings)
    random, delta = torch.Generator().manual_seed(5), torch.ones(16)
    buffers = [method.buffer() for method in methods]
    for start, greatest in ((0, 0.3), (6, 5.0), (12, 2.0)):
        written = torch.arange(start, start + 6) % 16
        delta[written] = 5.0 if start == 12 else 1.0
        learnt, priority = written[::2], greatest * torch.rand(3, generator=random)
        priority[0] = greatest
        delta[learnt] = priority
        for buffer in buffers:
            buffer.extend(TensorDict({"x": torch.zeros(6)}, [6]))
            buffer.update_priority(learnt, priority)
    expected = (delta.double() + 0.01) ** 0.7
    expected /= expected.sum()
    for method, buffer in zip(methods, buffers, strict=True):
        method.anneal(buffer.sampler, 0.5)  # β is 0.7
        drawn = torch.cat([buffer.sample() for _ in range(64)])
        weight = drawn["priority_weight"].double() * expected[drawn["index"]] ** 0.7
        assert weight.tolist() == pytest.approx([weight[0].item()] * 512, rel=1e-5)
        ours, figures = method is methods[0], method.figures(buffer, None)
        leaves = buffer.sampler._sum_tree[torch.arange(16)]
        assert (leaves / leaves.sum()).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert type(buffer.sampler) is (VLMPrioritizedSampler if ours else PrioritizedSampler)
        size = 1 / (16 * expected.square().sum().item())
        assert figures == pytest.approx(
            {"transitions": 16, "beta": 0.7, "effective_sample_size": size}
        )


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda _: rendering.main((5,), (3,), clips=1, rounds=1, seconds=0.01), "GB/s"),
        (lambda _: environment.main(size=5, num_envs=(2,), rounds=1, seconds=0.01), "Collector"),
        (lambda _: sampler.main(slots=(100,), batch_sizes=(8,), rounds=1, seconds=0.01), "100"),
        pytest.param(
            lambda _: scene.main(SCENE, 1, (1,), (32,), rounds=1, seconds=0.0),
            "with shadows",
            marks=pytest.mark.slow,
        ),
        (lambda _: scoring.main(clips=8, rounds=1), "all embeddings kept"),
        (
            lambda _: scoring.main("tiny", views=((56, 4),), clips=4, rounds=1, peak_teraflops=1),
            "PerceptionLM, random weights",
        ),
        pytest.param(
            lambda _: scoring.main(
                "tiny",
                views=((56, 4),),
                clips=4,
                rounds=1,
                compile=True,
                training_pairs=1,
                training_env_steps=3000,
            ),
            "÷ PER",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda out: training.training(pairs=1, env_steps=3000, out=out),
            "vlm_rb ÷ per",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda out: training.training(
                algorithm="iqn",
                method="mixture",
                peer="torchrl_per",
                pairs=1,
                env_steps=3000,
                out=out,
            ),
            "mixture ÷ torchrl_per",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda out: soak.soak(
                minutes=0.4,
                seconds_between_faults=6,
                rate=0.05,
                replay_capacity=3000,
                out=out / "run",
            ),
            "faults that the scorer counted",
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "rendering",
        "environment",
        "sampler",
        "scene",
        "scoring",
        "views",
        "beside",
        "training",
        "peers",
        "soak",
    ],
)
def test_benchmark_prints_its_table(run, expected, tmp_path, capsys):
    run(tmp_path)
    assert expected in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("benchmark", [update.main, rendering.main, scoring.main])
def test_a_gpu_that_is_not_here_is_refused_in_one_line(benchmark):
    with pytest.raises(SystemExit, match="device is cuda: name one that is here") as refusal:
        program(benchmark, ["--device=cuda"])
    assert "\n" not in str(refusal.value)


def test_a_peer_that_is_not_installed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="not installed: pip install stable-baselines3"):
        program(peers.main, [])


def test_timed_run_goes_on_with_no_other(tmp_path, monkeypatch):
    folders = []

    def measure(run):
        folders.append(run.folder)
        run.folder.mkdir(parents=True)  # there already would be another run's
        return {"env_steps": 1.0, "seconds": 1.0, "speed/updates_per_s": 1.0}

    monkeypatch.setattr(training, "measure", measure)
    for _ in range(2):
        training.training(pairs=1, env_steps=3000, out=tmp_path)
    assert len(set(folders)) == 4
    assert all(tmp_path in folder.parents for folder in folders)


@pytest.mark.parametrize("algorithm", update.PLAIN)
def test_plain_loop_of_the_update_benchmark_learns_what_the_recipe_learns(algorithm):
    """The same networks, draws and batches leave the same weights: so the same work is timed."""
    kind = getattr(import_module(f"recipes.{algorithm}"), algorithm.upper())
    torch.manual_seed(0)
    module = learner(kind)
    plain = copy.deepcopy(module)
    shown = []
    step = update.in_turn(update.PLAIN[algorithm](plain), lambda: update.rows_of(shown[-1]))
    for way in ("plain", "recipe"):
        torch.manual_seed(1)
        for seed in range(5):
            drawn = batch(algorithm in ("dqn", "iqn"), seed=seed)
            drawn = drawn.exclude("priority_weight", "steps_to_next_obs")
            shown.append(drawn)
            if way == "plain":
                step()
            else:
                getattr(module, module.next_update())(drawn)
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["dqn", pytest.param("td3", marks=pytest.mark.slow)])
def test_update_benchmark_prints_the_recipe_beside_the_plain_loop(algorithm, capsys):
    update.main(algorithm, rounds=1, seconds=0.0, compile=False)
    printed = capsys.readouterr().out
    assert "plain loop" in printed
    assert "recipe, eager" in printed
