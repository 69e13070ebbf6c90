"""TorchRL's own buffer and samplers in the recipes' loop: the peers of the throughput benchmark."""

from __future__ import annotations

from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from recipes.replay import Prioritized, Uniform, VLMGuided


def _stock_buffer(replay: Uniform | Prioritized, other_rows: int) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(replay.capacity),
        sampler=replay.sampler(),
        batch_size=replay.batch_size - other_rows,
        priority_key="td_error",
    )


class TorchRLUniform(Uniform):
    """``RandomSampler`` in a ``TensorDictReplayBuffer``."""

    def buffer(self, other_rows: int = 0) -> TensorDictReplayBuffer:
        """Build TorchRL's buffer."""
        return _stock_buffer(self, other_rows)


class TorchRLPrioritized(Prioritized):
    """``PrioritizedSampler`` in a ``TensorDictReplayBuffer``."""

    def buffer(self, other_rows: int = 0) -> TensorDictReplayBuffer:
        """Build TorchRL's buffer."""
        return _stock_buffer(self, other_rows)


class Unscored(VLMGuided):
    """The mixture without a judge: what its sampler and buffer cost alone."""

    uses_scores = False
