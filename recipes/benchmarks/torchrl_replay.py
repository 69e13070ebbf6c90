"""TorchRL's own buffer and samplers in the recipes' loop: the peers of the throughput benchmark."""

from __future__ import annotations

from torchrl.data import TensorDictReplayBuffer

from recipes.replay import Prioritized, Uniform, VLMGuided


class TorchRLUniform(Uniform):
    """``RandomSampler`` in a ``TensorDictReplayBuffer``."""

    buffer_class = TensorDictReplayBuffer


class TorchRLPrioritized(Prioritized):
    """``PrioritizedSampler`` in a ``TensorDictReplayBuffer``."""

    buffer_class = TensorDictReplayBuffer


class Unscored(VLMGuided):
    """The mixture without a judge: what its sampler and buffer cost alone."""

    uses_scores = False
