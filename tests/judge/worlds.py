"""A world whose every figure is known: a counter that succeeds when it reaches its end."""

from __future__ import annotations

from types import MappingProxyType

import torch
from rich.progress import Progress
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from vlmrb_torchrl.judge.judging import Examination, examine
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.scorers import PrivilegedScorer, PromptedScorer


class Counter(EnvBase):
    """One game, no batch, no demonstrator. Episodes of ``length`` steps; the last is success.

    The other event, "third", happens in step 3. A state is its number; a frame is that grey.

    Args:
        length: Steps of an episode.
        prompts: Questions about the events.
    """

    event_names = ("end", "third")
    success_event = "end"

    def __init__(self, length: int = 10, prompts: dict[str, str] | None = None) -> None:
        super().__init__(batch_size=torch.Size([]))
        self.length = length
        self.prompts = MappingProxyType(prompts or {"end": "Is it over?"})
        self.observation_spec = Composite(
            render_state=Unbounded((1,), dtype=torch.int64),
            events=Binary(2, (2,), None, torch.bool),
        )
        self.action_spec = Categorical(2, shape=(), dtype=torch.int64)
        self.reward_spec = Unbounded((1,))
        self._number = 0

    @staticmethod
    def renderer(edge: int = 8):
        def draw(states):
            shape = (*states.shape[:-1], 3, edge, edge)
            return (states % 256).to(torch.uint8)[..., None, None].expand(shape).contiguous()

        return draw

    def _state(self) -> dict[str, torch.Tensor]:
        happened = torch.tensor([self._number == self.length, self._number == 3])
        return {"render_state": torch.tensor([self._number]), "events": happened}

    def _reset(self, tensordict=None, **_):
        self._number = 0
        return TensorDict(self._state(), [])

    def _step(self, tensordict):
        self._number += 1
        done = torch.tensor([self._number == self.length])
        return TensorDict(
            {**self._state(), "reward": torch.zeros(1), "done": done, "terminated": done.clone()},
            [],
        )

    def _set_seed(self, seed):
        pass


class Grey(PromptedScorer):
    """Says how bright a clip's last frame is, whatever it is asked; the second prompt, how dark."""

    def __init__(self, prompts=("Is it over?",)) -> None:
        super().__init__(prompts)

    def score_prompts(self, tensordict):
        bright = tensordict["clip"][:, -1].float().mean((-3, -2, -1)) / 255
        return torch.stack([bright, 1 - bright], -1)[:, : len(self.prompts)]


def counted(**arguments) -> Settings:
    return Settings(
        arguments.pop("env", None) or Counter(),
        arguments.pop("scorers", None) or [PrivilegedScorer(("end", "third"), ("end",))],
        **{"policy": "random", "clips": 9, "clip_transitions": 4, "frames_per_clip": 2} | arguments,
    )


def examined(settings: Settings) -> Examination:
    return examine(settings, Progress(disable=True))
