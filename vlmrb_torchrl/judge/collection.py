"""Episodes played and cut into clips that know what happened in them; clips kept on disk.

N: clips, F: frames of a clip, E: events, G: games played together, T: transitions collected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from vlmrb_torchrl.checks import ConfigError, one_line, require
from vlmrb_torchrl.clips import Clip, ClipCutter, stack_clips
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.judge.settings import SCRIPTED, Settings
from vlmrb_torchrl.keys import EVENTS

CLIPS_FILE, META_FILE = "clips.safetensors", "meta.json"
OF_EACH_CLIP = (EVENTS, "shown", "episode", "first", "transitions")
"""What clips have beside their render states, which may be nested."""


class Behaviour(TensorDictModuleBase):
    """Plays by a policy, with a share of random actions in each game.

    Args:
        env: For its actions.
        policy: Writes the environment's action; None: every action is random.
        share: Probability of a random action, one for each game, float ``[*G]``.
    """

    def __init__(self, env: EnvBase, policy: TensorDictModuleBase | None, share: Tensor) -> None:
        super().__init__()
        self.in_keys = [] if policy is None else list(policy.in_keys)
        self.out_keys = [env.action_key]
        self._policy, self._spec, self._share = policy, env.action_spec, share

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action."""
        action = self._spec.rand()
        if self._policy is not None:
            chosen = self._policy(tensordict).get(self.out_keys[0])
            random = torch.rand(self._share.shape) < self._share
            random = random.reshape(*random.shape, *[1] * (chosen.ndim - random.ndim))
            action = torch.where(random.to(chosen.device), action.to(chosen.device), chosen)
        return tensordict.set(self.out_keys[0], action)


def behaviour(settings: Settings) -> Behaviour:
    """Who plays, tried once.

    Raises:
        ConfigError: The policy cannot act in this environment.
    """
    env, policy = settings.env, settings.policy
    share = torch.full(env.batch_size, settings.random_share)
    if policy == "mixed":
        share.view(-1)[1::2] = 1.0
    if isinstance(policy, str):
        policy = env.demonstrator() if policy in SCRIPTED else None
    actor = Behaviour(env, policy, share)
    try:
        env.step(actor(env.reset()))
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = one_line(error)[:200]
        raise ConfigError(
            f"policy is {type(policy).__name__}: it cannot act in {type(env).__name__} "
            f"({reason}); set env as it was trained"
        ) from error
    return actor


def collect(settings: Settings, advance: Callable[[int], object]) -> TensorDict:
    """Play until there are ``settings.clips`` clips; those still open at the end are left out.

    ``advance`` is told how many clips were added.

    Returns:
        Clips ``[N]``: ``render_state`` ``[N, F, *S]``, ``events`` bool ``[N, E]``, ``shown`` (the
        event happened after the first frame) bool ``[N, E]``, and int64 ``[N]`` each: ``episode``,
        ``first`` (its place in the episode) and ``transitions`` (covered).
    """
    env, actor = settings.env, behaviour(settings)
    env.set_seed(settings.seed)
    torch.manual_seed(settings.seed)
    cutter = ClipCutter(settings.clip_transitions, settings.frames_per_clip, settings.stride)
    collector = Collector(
        env,
        actor,
        frames_per_batch=env.batch_size.numel() * settings.clip_transitions,
        total_frames=-1,
        storing_device="cpu",
        exploration_type=ExplorationType.DETERMINISTIC,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )
    clips: list[Clip] = []
    events, episodes = [], []
    try:
        for data in collector:
            index = cutter.transitions + torch.arange(data.numel())
            events.append(data["next", EVENTS].reshape(data.numel(), -1).numpy())
            episodes.append(data["collector", "traj_ids"].reshape(-1).numpy())
            cut = cutter.cut(data, index, torch.zeros_like(index))
            advance(min(len(cut), settings.clips - len(clips)))
            clips += cut
            if len(clips) >= settings.clips:
                break
    finally:
        collector.shutdown()
    return _described(clips[: settings.clips], np.concatenate(events), np.concatenate(episodes))


def _described(clips: list[Clip], events: NDArray[Any], episodes: NDArray[Any]) -> TensorDict:
    """Clips with their place in the episodes; ``events`` ``[T, E]``, ``episodes`` ``[T]``."""
    batch = stack_clips(clips)
    frames = batch["render_state"].shape[1]
    shown = [clip.index[shown_outcomes(len(clip), frames)[0] + 1 :] for clip in clips]
    starts = [clip.index[0] for clip in clips]
    episode = episodes[starts]
    first = [(episodes[:k] == own).sum() for k, own in zip(starts, episode, strict=True)]
    batch["shown"] = torch.from_numpy(np.stack([events[index].any(0) for index in shown]))
    batch["episode"] = torch.from_numpy(episode)
    batch["first"] = torch.from_numpy(np.array(first))
    batch["transitions"] = torch.tensor([len(clip) for clip in clips])
    return batch


def save(folder: Path, clips: TensorDict, meta: dict[str, Any]) -> None:
    """Keep clips ``[N]`` and what is to be known about them; nothing in the files can run."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in clips.flatten_keys(".").items()}
    partial = folder / f"{CLIPS_FILE}.partial"
    save_file(tensors, partial)
    os.replace(partial, folder / CLIPS_FILE)
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """Read what is known about the clips in ``folder``; a ConfigError if it holds none."""
    here = (folder / CLIPS_FILE).is_file() and (folder / META_FILE).is_file()
    require(here, "load", folder, "it holds no clips; name a folder written by --save")
    try:
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text())
        meta["arguments"]["env"]["class_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"load is {folder}: {META_FILE} is not of --save ({error!r})") from error
    return meta


def load(settings: Settings) -> TensorDict:
    """Read the clips in ``settings.load``, ``[N]``.

    Raises:
        ConfigError: The file is no safetensors, not one of clips, or of another environment.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = settings.load
    assert folder is not None
    try:
        tensors = load_file(folder / CLIPS_FILE)
    except SafetensorError as error:
        raise ConfigError(f"load is {folder}: {CLIPS_FILE} cannot be read ({error})") from error
    lacks = ", ".join(name for name in OF_EACH_CLIP if name not in tensors)
    require(not lacks, "load", folder, f"{CLIPS_FILE} has no {lacks}")
    known, env = tensors[EVENTS].shape[-1], settings.env
    remedy = f"its clips know {known} events, {type(env).__name__} reports others"
    require(known == len(env.event_names), "load", folder, remedy)
    return TensorDict(tensors, [len(tensors[EVENTS])]).unflatten_keys(".")
