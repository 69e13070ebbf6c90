"""Figure 2 of the paper: along one episode, a judge's scores against what critics make of it.

    python -m recipes.dqn --training.policies_every_env_steps 20000 --training.name watched
    python -m recipes.value_and_score --run runs/watched

A judge marks an event from the first update on; a critic has to learn that it matters.
T: steps of the episode, Q: questions, K: copies of the weights, L: transitions of a clip.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from recipes.arguments import NonNegativeInt, PositiveInt, program
from recipes.learning import Algorithm
from recipes.running.cli import build_algorithm
from recipes.running.policies import load_weights, settings_of
from vlmrb_torchrl import ClipRenderTransform
from vlmrb_torchrl.checks import require
from vlmrb_torchrl.envs import DemonstratedEnv
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.keys import EVENTS, RENDER_STATE, SCORE
from vlmrb_torchrl.renderers import Renderer
from vlmrb_torchrl.scorers import ClipScorer, PromptedScorer

_READ = ("observation", *(("next", k) for k in ("observation", "terminated", EVENTS, RENDER_STATE)))
_MOST_STEPS = 1000
_COPIES = 6
_FRAMES = 9
_FRAMES_PER_CLIP = 32


@dataclass
class Curves:
    """What a picture shows of one episode.

    Attributes:
        scores: By question, float ``[T]``: of the clip that ends with step t; NaN for none.
        differences: By environment steps trained, float ``[T]``: V(s_{t+1}) - V(s_t).
        events: By name, the steps at which it happened.
        frames: What the judge sees of the outcome of each step, uint8 ``[T, 3, H, W]``; None if it
            sees nothing.
    """

    scores: dict[str, NDArray[np.float64]]
    differences: dict[int, NDArray[np.float64]]
    events: dict[str, list[int]]
    frames: Tensor | None


# -------------------------------------------------------------------- the figures


@torch.no_grad()
def play(env: EnvBase, policy: TensorDictModuleBase, random_steps: int, seed: int) -> TensorDict:
    """Play one episode of one game, ``[T]``: at random for ``random_steps``, then by ``policy``."""
    torch.manual_seed(seed)
    parts = [env.rollout(random_steps)] if random_steps else []
    if not parts or not parts[0][..., -1]["next", "done"].any():
        start = step_mdp(parts[0][..., -1]) if parts else env.reset()
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            rest = env.rollout(_MOST_STEPS, policy, auto_reset=False, tensordict=start)
        parts.append(rest)
    kept = [part.select(*_READ, strict=False) for part in parts]
    episode: TensorDict = torch.cat(kept, -1)[0]
    return episode


def clips_ending_at_each_step(episode: TensorDictBase, transitions: int) -> TensorDict:
    """Cut the clips ``[T]`` of the ``transitions`` last steps up to each, fewer at the start."""
    T, outcome = len(episode), episode["next"]
    frames = min(transitions, _FRAMES_PER_CLIP)
    starts = [max(0, t + 1 - transitions) for t in range(T)]
    shown = [start + shown_outcomes(t + 1 - start, frames) for t, start in enumerate(starts)]
    clips = TensorDict({}, [T])
    if RENDER_STATE in outcome.keys():  # noqa: SIM118
        clips.set(RENDER_STATE, outcome[RENDER_STATE][torch.from_numpy(np.stack(shown))])
    if EVENTS in outcome.keys():  # noqa: SIM118
        happened = [outcome[EVENTS][start : t + 1].any(0) for t, start in enumerate(starts)]
        clips.set(EVENTS, torch.stack(happened))
    return clips


def judged(
    clips: TensorDict, renderer: Renderer | None, judges: dict[str, ClipScorer]
) -> dict[str, NDArray[np.float64]]:
    """Score clips ``[T]`` by each of the judges."""
    draw = None if renderer is None else ClipRenderTransform(renderer)
    scores: dict[str, list[float]] = {name: [] for name in judges}
    for part in clips.split(16):
        drawn = part if draw is None else draw(part)
        for name, judge in judges.items():
            scores[name] += judge(drawn.copy())[SCORE].tolist()
    return {name: np.array(each) for name, each in scores.items()}


@torch.no_grad()
def value_differences(module: Algorithm, episode: TensorDictBase) -> NDArray[np.float64]:
    """V(s_{t+1}) - V(s_t) of each step, ``[T]``; a state that ends an episode is worth 0.

    As the critic is trained: no value is bootstrapped from such a state, and nothing ever teaches
    its own.
    """
    before, outcome = module.value(episode["observation"]), episode["next"]
    after = module.value(outcome["observation"]) * ~outcome["terminated"].squeeze(-1)
    differences: NDArray[np.float64] = (after - before).double().numpy()
    return differences


# -------------------------------------------------------------------- table and picture


def write_table(curves: Curves, path: Path) -> None:
    """Write a row for each step."""
    columns: dict[str, Iterable[Any]] = {
        **{f"score {question}": each for question, each in curves.scores.items()},
        **{f"value difference {steps}": each for steps, each in curves.differences.items()},
    }
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "events", *columns])
        for t, row in enumerate(zip(*columns.values(), strict=True)):
            happened = [name for name, steps in curves.events.items() if t in steps]
            table.writerow([t, " ".join(happened), *(f"{number:.6g}" for number in row)])


def draw(curves: Curves, title: str, paths: Iterable[Path]) -> None:
    """Draw the judge above the critics, the youngest first, and frames of the episode beneath."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    T, K = len(next(iter(curves.differences.values()))), len(curves.differences)
    heights = [1.7, *[1.0] * K]
    shown = _frames_to_show(curves, T)
    figure = Figure(figsize=(9, 1.0 + 0.72 * sum(heights) + (1.5 if shown else 0)))
    above = figure.add_gridspec(
        1 + K, 1, height_ratios=heights, left=0.13, right=0.97, hspace=0.16,
        top=1 - 0.75 / figure.get_figheight(),
        bottom=(1.8 if shown else 0.5) / figure.get_figheight(),
    )  # fmt: skip
    axes: Any = above.subplots(sharex=True)
    step = np.arange(T)
    for k, (question, scores) in enumerate(curves.scores.items()):
        look = {"color": colormaps["tab10"](k), "clip_on": False, "label": question}
        axes[0].plot(step, scores, drawstyle="steps-mid", lw=1.8, **look)
        axes[0].fill_between(step, scores, step="mid", color=look["color"], alpha=0.08, lw=0)
    axes[0].set(ylim=(0, 1), yticks=(0, 1), xlim=(-0.6, T - 0.4))
    axes[0].set_ylabel("judge's\nscore", fontsize=9)
    axes[0].legend(loc="center left", frameon=False, fontsize=8)
    every = np.concatenate(list(curves.differences.values()))
    low, high = min(every.min(), 0), max(every.max(), 0)
    margin = 0.08 * (high - low) or 1.0
    for axis, (steps, difference), shade in zip(
        axes[1:], curves.differences.items(), np.linspace(0.15, 0.85, K), strict=True
    ):
        axis.bar(step, difference, width=0.8, color=colormaps["viridis_r"](shade))
        axis.axhline(0, color="0.6", lw=0.6)
        axis.set(ylim=(low - margin, high + margin), yticks=(0,))
        axis.set_yticklabels([f"{steps:,}"])
        axis.tick_params(axis="x", length=0)
        axis.spines["bottom"].set_visible(False)
    middle = (axes[1].get_position().y1 + axes[-1].get_position().y0) / 2
    label = "V(s') - V(s) of the critic after … env steps"
    figure.text(0.022, middle, label, rotation=90, va="center", ha="center", fontsize=9)
    largest = f"largest bar: {every[np.abs(every).argmax()]:+.2f}"
    axes[-1].text(0, low, largest, fontsize=8, color="0.35", va="bottom")
    axes[-1].spines["bottom"].set_visible(True)
    axes[-1].set_xlabel("step of the episode", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        for at in curves.events.values():
            for t in at:
                axis.axvline(t, color="0.35", lw=0.9, ls=":", zorder=0)
    for name, at in curves.events.items():
        for t in at:
            axes[0].text(t, 1.06, name, ha="center", va="bottom", fontsize=9, weight="bold")
    figure.suptitle(title, x=0.13, y=1 - 0.1 / figure.get_figheight(), ha="left", fontsize=11)
    if shown:
        assert curves.frames is not None
        strip: Any = figure.add_gridspec(
            1, len(shown), left=0.13, right=0.97, wspace=0.06,
            bottom=0.08 / figure.get_figheight(), top=1.1 / figure.get_figheight(),
        )  # fmt: skip
        for k, t in enumerate(shown):
            axis = figure.add_subplot(strip[k])
            axis.imshow(curves.frames[t].permute(1, 2, 0).numpy(), interpolation="nearest")
            names = [name for name, at in curves.events.items() if t in at]
            axis.set_title(", ".join([*names, f"step {t}"]), fontsize=7.5, pad=3)
            axis.axis("off")
    for path in paths:
        figure.savefig(path, dpi=150)


def _frames_to_show(curves: Curves, T: int) -> list[int]:
    """The steps of events, and others spread evenly."""
    if curves.frames is None:
        return []
    shown = {t for at in curves.events.values() for t in at}
    for t in np.linspace(0, T - 1, _FRAMES).round().astype(int).tolist():
        if len(shown) < _FRAMES and min((abs(t - other) for other in shown), default=T) > 1:
            shown.add(t)
    return sorted(shown)[:_FRAMES]


# -------------------------------------------------------------------- the program


def main(
    run: Path,
    env_steps: list[NonNegativeInt] | None = None,
    prompts: list[str] | None = None,
    seed: NonNegativeInt = 0,
    random_steps: NonNegativeInt = 15,
    clip_transitions: PositiveInt = 8,
    out: Path | None = None,
) -> None:
    """Draw a judge's scores along an episode above what critics of several ages make of it.

    The episode is one of the run's task that training never played: first at random, then by the
    environment's demonstrator, or by the last of the policies shown where it has none. At each
    step there are the judge's score of the clip that ends there and, for each copy of the weights,
    how much the value of the state changes; a state that ends the episode is worth 0.

    Args:
        run: Folder of a run that kept weights, by ``--training.policies_every_env_steps``; it says
            which task, which algorithm and which judge.
        env_steps: After how many environment steps critics are shown, of the copies that lie in
            ``run`` the next ones; null: six, spread evenly.
        prompts: What the judge is asked, each a curve: names of the environment's events, or whole
            questions; null: what the run asked it.
        seed: Of the episode and of its random actions.
        random_steps: Random actions that it begins with.
        clip_transitions: Transitions of the clips, each one step further than the last; the fewer,
            the sharper an event is marked.
        out: Of the files, without the ending: .png, .svg, .csv; null: value_and_score in ``run``.
    """
    written, config = run / "policy.yaml", run / "config.yaml"
    here = written.is_file() and config.is_file()
    require(here, "run", run, "name a run's folder, which holds config.yaml and policy.yaml")
    where, _, name = json.loads(written.read_text())["init_args"]["algorithm"].rpartition(".")
    algorithm: type[Algorithm] = getattr(import_module(where), name)
    copies = _chosen(run, env_steps)
    settings = settings_of(config, algorithm)
    module: Algorithm = build_algorithm(algorithm, settings)
    with closing(settings.env.make(1, seed=seed, held_out=True)) as env:
        load_weights(module, max(copies.items())[1])
        demonstrated = isinstance(env, DemonstratedEnv)
        policy = env.demonstrator() if demonstrated else module.policy
        episode = play(env, policy, random_steps, seed)
        judges = _asked(settings.scoring.scorer, prompts, getattr(env, "prompts", {}))
    for judge in judges.values():
        judge.load()
    renderer = settings.env.renderer()
    clips = clips_ending_at_each_step(episode, clip_transitions)
    scores = judged(clips, renderer, judges)
    differences = {}
    for steps, copy in copies.items():
        load_weights(module, copy)
        differences[steps] = value_differences(module, episode)
    names, outcome = settings.env.event_names, episode["next"]
    events = {
        event: outcome[EVENTS][:, k].nonzero().flatten().tolist() for k, event in enumerate(names)
    }
    frames = None if renderer is None else renderer(outcome[RENDER_STATE])
    curves = Curves(scores, differences, events, frames)
    base = run / "value_and_score" if out is None else out
    files = [base.with_name(f"{base.name}.{ending}") for ending in ("csv", "png", "svg")]
    base.parent.mkdir(parents=True, exist_ok=True)
    write_table(curves, files[0])
    task = settings.env.name or type(settings.env).__name__
    draw(curves, f"{name} on {task}: what a judge marks, and what critics make of it", files[1:])
    print(*files, sep="\n")


def _chosen(run: Path, env_steps: list[int] | None) -> dict[int, Path]:
    """The copies of the weights to show, by their environment steps."""
    kept = {int(path.stem.split("_")[1]): path for path in run.glob("policy_[0-9]*.ckpt")}
    remedy = "it holds no policy_<steps>.ckpt: train with --training.policies_every_env_steps"
    require(bool(kept), "run", run, remedy)
    require(env_steps != [], "env_steps", [], "name at least one, or null for six of them")
    steps = np.array(sorted(kept))
    wanted = np.linspace(0, steps[-1], _COPIES) if env_steps is None else np.array(env_steps)
    nearest = {int(steps[abs(steps - each).argmin()]) for each in wanted}
    return {each: kept[each] for each in sorted(nearest)}


def _asked(
    scorer: ClipScorer, prompts: list[str] | None, known: dict[str, str]
) -> dict[str, ClipScorer]:
    """The judge by what it is asked."""
    if prompts is None:
        event_of = {text: event for event, text in known.items()}
        words = getattr(scorer, "prompts", ())
        return {" or ".join(event_of.get(word, word) for word in words) or repr(scorer): scorer}
    able = isinstance(scorer, PromptedScorer)
    require(able, "prompts", prompts, f"{type(scorer).__name__} cannot be asked: leave them out")
    return {prompt: scorer.asking([known.get(prompt, prompt)]) for prompt in prompts}  # type: ignore[attr-defined]


if __name__ == "__main__":
    program(main)
