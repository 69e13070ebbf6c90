"""What a run of a recipe learned, as a policy that anything can play by."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from jsonargparse.typing import Path_fr
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from recipes.cli import build_algorithm, build_parser
from recipes.dqn import DQN


class TrainedPolicy(TensorDictModuleBase):
    """The greedy policy of a finished run.

    Args:
        checkpoint: The run's ``policy.ckpt``; its ``config.yaml`` must lie beside it.
        algorithm: What was trained.

    Example:
        >>> policy = TrainedPolicy("runs/dqn_doorkey_6x6_vlmguided_s0/policy.ckpt")
        >>> env.rollout(100, policy)  # doctest: +SKIP
    """

    def __init__(self, checkpoint: Path_fr | str, algorithm: type[L.LightningModule] = DQN) -> None:
        super().__init__()
        path = Path(checkpoint)
        parser = build_parser(algorithm)
        config = parser.parse_path(str(path.with_name("config.yaml")))
        config.scoring = parser.get_defaults().scoring  # its judge may not even be here
        module = build_algorithm(algorithm, parser.instantiate(config))
        saved = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(saved["algorithm"])
        self.policy = module.policy.requires_grad_(False)
        self.in_keys, self.out_keys = self.policy.in_keys, self.policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the greedy action, and what else the actor writes."""
        played: TensorDictBase = self.policy(tensordict)
        return played
