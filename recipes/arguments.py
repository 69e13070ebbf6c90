"""Arguments that the algorithms share, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vlmrb_torchrl.checks import is_positive, is_real, is_whole, require

Rule = tuple[Callable[[Any], bool], str]

_POSITIVE: Rule = (is_positive, "use more than 0")
_NOT_NEGATIVE: Rule = (lambda x: is_real(x, 0), "use 0 or more")
_COUNT: Rule = (lambda x: is_whole(x, 1), "use >= 1")
_WIDEST = 1 << 16
_RULES: dict[str, Rule] = {
    "hidden_features": (
        lambda x: isinstance(x, (list, tuple)) and all(is_whole(width, 1, _WIDEST) for width in x),
        f"use 1 to {_WIDEST} each",
    ),
    "gamma": (lambda x: is_real(x, 0) and x < 1, "use a number in [0, 1)"),
    "n_steps": _COUNT,
    "reward_scale": _POSITIVE,
    "target_update_rate": (lambda x: is_positive(x, 1), "use a number in (0, 1]"),
    "learning_rate": _POSITIVE,
    "adam_eps": _POSITIVE,
    "gradient_clip_norm": (lambda x: x == math.inf or is_positive(x), "use more than 0"),
    "epsilon_final": (lambda x: is_real(x, 0, 1), "use 0 to 1"),
    "epsilon_share": (lambda x: is_real(x, 0, 1), "use 0 to 1"),
    "num_critics": _COUNT,
    "alpha_init": _POSITIVE,
    "target_entropy": (lambda x: x is None or is_real(x), "use a number, or null"),
    "policy_delay": _COUNT,
    "exploration_noise": _NOT_NEGATIVE,
    "target_noise": _NOT_NEGATIVE,
    "target_noise_clip": _NOT_NEGATIVE,
}


def check_arguments(**arguments: Any) -> None:
    """Refuse an argument of an algorithm that cannot work, by its name.

    One that no other algorithm has is not known here: its algorithm checks it.

    Raises:
        ConfigError: In one line, with the argument, its value and the remedy.

    Example:
        >>> check_arguments(gamma=0.99, learning_rate=3e-4)
    """
    for name, value in arguments.items():
        if name in _RULES:
            allowed, remedy = _RULES[name]
            require(allowed(value), f"algorithm.{name}", value, remedy)
