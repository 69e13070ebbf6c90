"""Arguments that the algorithms share, and what they may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmrb_torchrl.checks import require

Rule = tuple[Callable[[Any], bool], str]

_POSITIVE: Rule = (lambda x: x > 0, "use more than 0")
_NOT_NEGATIVE: Rule = (lambda x: x >= 0, "use 0 or more")
_COUNT: Rule = (lambda x: x >= 1, "use >= 1")
_RULES: dict[str, Rule] = {
    "hidden_features": (lambda x: all(width >= 1 for width in x), "use 1 or more each"),
    "gamma": (lambda x: 0 <= x < 1, "use a number in [0, 1)"),
    "n_steps": _COUNT,
    "reward_scale": _POSITIVE,
    "target_update_rate": (lambda x: 0 < x <= 1, "use a number in (0, 1]"),
    "learning_rate": _POSITIVE,
    "adam_eps": _POSITIVE,
    "gradient_clip_norm": _POSITIVE,
    "epsilon_final": (lambda x: 0 <= x <= 1, "use 0 to 1"),
    "epsilon_env_steps": _COUNT,
    "num_critics": _COUNT,
    "alpha_init": _POSITIVE,
    "policy_delay": _COUNT,
    "exploration_noise": _NOT_NEGATIVE,
    "target_noise": _NOT_NEGATIVE,
    "target_noise_clip": _NOT_NEGATIVE,
}


def check_arguments(**arguments: Any) -> None:
    """Refuse an argument of an algorithm that cannot work, by its name.

    Raises:
        ConfigError: In one line, with the argument, its value and the remedy.

    Example:
        >>> check_arguments(gamma=0.99, learning_rate=3e-4)
    """
    for name, value in arguments.items():
        allowed, remedy = _RULES[name]
        require(allowed(value), f"algorithm.{name}", value, remedy)
