"""What a run of a recipe learned, as a policy that anything can play by."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from jsonargparse import Namespace
from jsonargparse.typing import Path_fr
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from recipes.dqn import DQN
from recipes.learning import Algorithm
from recipes.running.cli import build_algorithm, build_parser
from vlmrb_torchrl.checks import ConfigError, shown


def settings_of(config: Path, algorithm: type[Algorithm], *, judge: bool = True) -> Namespace:
    """Build what a run's ``config.yaml`` says; without its judge, which may not even be here."""
    parser = build_parser(algorithm)
    given = parser.parse_path(str(config))
    if not judge:
        given.scoring = parser.get_defaults().scoring
    return parser.instantiate(given)


def load_weights(module: Algorithm, checkpoint: Path) -> int:
    """Load a copy of a run's weights; return after how many environment steps it was made.

    Raises:
        ConfigError: The file holds something else than the weights of such a module.
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(saved["algorithm"])
        return int(saved["env_steps"])
    except (UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(
            f"checkpoint is {checkpoint}: it holds no weights of {type(module).__name__} "
            f"({shown(error)}); name the policy.ckpt of a run"
        ) from None


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

    def __init__(self, checkpoint: Path_fr | str, algorithm: type[Algorithm] = DQN) -> None:
        super().__init__()
        path = Path(checkpoint)
        settings = settings_of(path.with_name("config.yaml"), algorithm, judge=False)
        module: Algorithm = build_algorithm(algorithm, settings)
        load_weights(module, path)
        self.policy = module.policy.requires_grad_(False)
        self.in_keys, self.out_keys = self.policy.in_keys, self.policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the greedy action, and what else the actor writes."""
        played: TensorDictBase = self.policy(tensordict)
        return played
