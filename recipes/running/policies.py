"""What a run of a recipe learned, as a policy that anything can play by."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import lightning as L
import torch
from jsonargparse.typing import Path_fr
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from recipes.dqn import DQN
from recipes.running.cli import build_algorithm, build_parser
from vlmrb_torchrl.checks import ConfigError, shown


class TrainedPolicy(TensorDictModuleBase):
    """The greedy policy of a finished run.

    Args:
        checkpoint: The run's ``policy.ckpt``; its ``config.yaml`` must lie beside it.
        algorithm: What was trained.

    Raises:
        ConfigError: The file holds something else than the weights of ``algorithm``.

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
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            module.load_state_dict(saved["algorithm"])
        except (UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
            raise ConfigError(
                f"checkpoint is {path}: it holds no weights of {algorithm.__name__} "
                f"({shown(error)}); name the policy.ckpt of a run"
            ) from None
        self.policy = module.policy.requires_grad_(False)
        self.in_keys, self.out_keys = self.policy.in_keys, self.policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the greedy action, and what else the actor writes."""
        played: TensorDictBase = self.policy(tensordict)
        return played
