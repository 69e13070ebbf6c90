"""TorchRL's own buffer and samplers in the recipes' loop: the peers of the throughput benchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl.data import PrioritizedSampler, TensorDictReplayBuffer

from recipes.replay import Prioritized, Replay, Uniform, VLMGuided


class TorchRLUniform(Uniform):
    """``RandomSampler`` in a ``TensorDictReplayBuffer``."""

    buffer_class = TensorDictReplayBuffer


class TorchRLPrioritized(Prioritized):
    """``PrioritizedSampler`` in a ``TensorDictReplayBuffer``; its trees are in no checkpoint."""

    buffer_class = TensorDictReplayBuffer

    def sampler(self) -> PrioritizedSampler:
        """Build TorchRL's, which wants its extension and divides weights by the greatest."""
        return PrioritizedSampler(
            self.capacity, alpha=self.alpha, beta=self.beta_start, eps=self.td_error_offset
        )

    def figures(self, buffer: Any, drawn: Tensor | None) -> dict[str, float]:
        """Say of TorchRL's tree what PER says of ours."""
        figures = Replay.figures(self, buffer, drawn) | {"beta": float(buffer.sampler.beta)}
        if len(buffer):
            priorities = torch.as_tensor(buffer.sampler._sum_tree[torch.arange(len(buffer))])
            share = priorities.double() / priorities.double().mean()
            figures["effective_sample_size"] = 1.0 / float(share.square().mean())
        return figures


class Unscored(VLMGuided):
    """The mixture without a judge: what its sampler and buffer cost alone."""

    uses_scores = False
