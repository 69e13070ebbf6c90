"""What is examined and how; what cannot work is refused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from vlmrb_torchrl.checks import ConfigError, require
from vlmrb_torchrl.envs import DemonstratedEnv
from vlmrb_torchrl.keys import RENDER_STATE
from vlmrb_torchrl.renderers import Renderer
from vlmrb_torchrl.scorers import ClipScorer
from vlmrb_torchrl.scorers.embedded import TILE_SIZE, WINDOW

SCRIPTED = ("mixed", "scripted")


@dataclass
class Settings:
    """How episodes are played, clips cut and shown, judges asked and the report written.

    Args:
        env: Any TorchRL environment class with a render state, events, prompts and a renderer
            (``vlmrb_torchrl.envs.JudgedEnv``). Its arguments: --env.size 8.
        scorers: The judges, a list: '[EmbeddedJudge, {class_path: HuggingFaceScorer, init_args:
            {model: facebook/Perception-LM-1B}}]'.
        policy: Who plays. mixed: half of the games at random, half by script; scripted: the
            environment's own demonstrator; random; a policy's class path with its arguments, as
            --policy my_module.MyPolicy --policy.path x; or a recipe's run, as
            runs/dqn_doorkey_6x6_vlmguided_s0/policy.ckpt.
        random_share: Share of random actions in games that are not played at random anyway.
        prompts: What the judges are asked, each prompt judged by itself: names of the
            environment's events (asked in its own words) or whole questions, for contrastive
            models captions. Several cost little more than one. null: what each scorer was built
            to ask.
        event: What makes a clip a positive where a question does not say so: one of the
            environment's events; null: its success.
        renderer: Arguments of the environment's renderer, as '{tile_size: 28, window: null}'.
            null: its defaults, or the view that the embedded judge knows if it can draw that.
        clips: Clips to judge.
        clip_transitions: Consecutive transitions that a clip covers.
        frames_per_clip: Frames of them that are shown, the last outcome among them.
        stride: Transitions between the starts of two clips; null: no overlap.
        threshold: A score from here on is a Yes.
        batch_clips: Clips that a judge sees at once.
        gallery: Clips shown of each outcome of each judge: the most confident mistakes, and right
            answers at random.
        resamples: Of the bootstrap over episodes, for the intervals.
        seed: Of episodes (it is handed to the environment), actions, resamples and the gallery.
        torch_threads: Threads of a tensor operation on the CPU.
        out: Folder of the report.
        save: Folder to keep the scored clips in, as a data set; null: they are not kept.
        load: Folder of clips kept by --save, to judge instead of new ones.
    """

    env: EnvBase
    scorers: list[ClipScorer]
    policy: Literal["mixed", "scripted", "random"] | TensorDictModuleBase = "mixed"
    random_share: ClosedUnitInterval = 0.5
    prompts: list[str] | None = None
    event: str | None = None
    renderer: dict[str, Any] | None = None
    clips: PositiveInt = 400
    clip_transitions: PositiveInt = 32
    frames_per_clip: PositiveInt = 32
    stride: PositiveInt | None = None
    threshold: ClosedUnitInterval = 0.5
    batch_clips: PositiveInt = 16
    gallery: NonNegativeInt = 12
    resamples: PositiveInt = 2000
    seed: NonNegativeInt = 0
    torch_threads: PositiveInt = 1
    out: Path = Path("runs/judge")
    save: Path | None = None
    load: Path | None = None
    draw: Renderer = field(init=False)

    def __post_init__(self) -> None:
        longest = self.clip_transitions
        remedy = f"use 1 to clip_transitions ({longest}), or null for no overlap"
        require((self.stride or 1) <= longest, "stride", self.stride, remedy)
        require(bool(self.scorers), "scorers", [], "name at least one, --scorers '[EmbeddedJudge]'")
        self._check_env()
        if self.load is None and self.policy in SCRIPTED:
            self._check_script()
        for name in ("out", "save"):
            folder = getattr(self, name)
            require(folder is None or not folder.is_file(), name, folder, "it is a file")
        self.draw = self._renderer()
        for scorer in self.scorers:
            here = scorer.device.type != "cuda" or torch.cuda.is_available()
            require(here, f"{type(scorer).__name__}.device", "cuda", "no GPU is here: use cpu")

    def _check_env(self) -> None:
        """Refuse an environment that no judge can be shown, and what it cannot be asked."""
        env, name = self.env, type(self.env).__name__
        asked = ("event_names", "success_event", "prompts", "renderer")
        lacks = ", ".join(attribute for attribute in asked if not hasattr(env, attribute))
        require(not lacks, "env", name, f"it has no {lacks}; see JudgedEnv")
        self.event = env.success_event if self.event is None else self.event
        known = ", ".join(env.event_names)
        require(self.event in env.event_names, "event", self.event, f"{name} reports {known}")
        require(self.prompts != [], "prompts", [], "ask something, or null for the scorers' own")
        for prompt in self.prompts or []:
            # A slip of the keyboard must not become a question that a model answers anyhow.
            remedy = f"use {', '.join(env.prompts)}, or a question of several words"
            understood = prompt in env.prompts or " " in prompt.strip()
            require(understood, "prompts", repr(prompt), remedy)

    def _check_script(self) -> None:
        """Refuse a script that no environment has, or half of a single game."""
        remedy = f"{type(self.env).__name__} has no demonstrator(): use random, or a class path"
        require(isinstance(self.env, DemonstratedEnv), "policy", self.policy, remedy)
        several = self.env.batch_size.numel() > 1
        remedy = "there is one game, of which half is none: use scripted, or play more games"
        require(several or self.policy == "scripted", "policy", self.policy, remedy)

    def _renderer(self) -> Renderer:
        """Build the renderer; draw one frame to see its size."""
        make, known = self.env.renderer, inspect.signature(self.env.renderer).parameters
        given = self.renderer
        if given is None:
            given = {"tile_size": TILE_SIZE, "window": WINDOW}
            given = given if given.keys() <= known.keys() else {}
        try:
            renderer: Renderer = make(**given)
            state = self.env.observation_spec[RENDER_STATE].zero()
            height, width = renderer(state).shape[-2:]
        except (TypeError, ValueError) as error:
            takes = ", ".join(known) or "no arguments"
            raise ConfigError(f"renderer is {given}: {error} (it takes {takes})") from error
        for scorer in self.scorers:
            require(
                scorer.frame_size in (None, (height, width)),
                f"the view of {type(self.env).__name__}, in pixels,",
                (height, width),
                f"{type(scorer).__name__} knows {scorer.frame_size} only: set renderer",
            )
        return renderer
