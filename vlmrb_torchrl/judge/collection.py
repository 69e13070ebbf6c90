"""Episodes played and cut into clips that know what happened in them.

N: clips, F: frames of a clip, E: events, G: games played together, T: transitions collected.
"""

from __future__ import annotations

from collections.abc import Callable
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

from vlmrb_torchrl.checks import ConfigError, one_line
from vlmrb_torchrl.clips import Clip, stack_clips
from vlmrb_torchrl.cutting import ClipCutter
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.judge.settings import SCRIPTED, Settings
from vlmrb_torchrl.keys import EVENTS


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
        name = type(policy).__name__
        reason = one_line(error)[:200]
        raise ConfigError(
            f"policy is {name}: it cannot act in {type(env).__name__} ({reason}); "
            "set env as it was trained"
        ) from error
    return actor


def collect(settings: Settings, advance: Callable[[int], object]) -> TensorDict:
    """Play until there are ``settings.clips`` clips; those still open at the end are left out.

    Args:
        settings: What to play and how to cut it.
        advance: Told how many clips were added.

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
    shown = [
        events[clip.index[shown_outcomes(len(clip), frames)[0] + 1 :]].any(0) for clip in clips
    ]
    by_episode = np.argsort(episodes, kind="stable")
    begins = np.flatnonzero(np.diff(episodes[by_episode], prepend=-1))
    place = np.empty_like(by_episode)  # of a transition in its episode
    lengths = np.diff(begins, append=len(episodes))
    place[by_episode] = np.arange(len(episodes)) - begins.repeat(lengths)
    starts = np.array([clip.index[0] for clip in clips])
    batch["shown"] = torch.from_numpy(np.stack(shown))
    batch["episode"] = torch.from_numpy(episodes[starts])
    batch["first"] = torch.from_numpy(place[starts])
    batch["transitions"] = torch.tensor([len(clip) for clip in clips])
    return batch
