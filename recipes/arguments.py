"""Numbers with a range, as types for signatures: ``--help`` names it, bad values are refused.

    def __init__(self, env: EnvBase, *, gamma: RightOpenUnitInterval = 0.95) -> None:

Only the command line checks; what reaches a class is a plain number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import set_parsing_settings
from jsonargparse.typing import register_type, restricted_number_type

from vlmrb_torchrl.checks import ConfigError, shown

set_parsing_settings(unset_sentinel=True)  # null is a value, and as such checked


def number(name: str, kind: type, *bounds: tuple[str, float]) -> Any:
    """Build a type of numbers of ``kind`` within ``bounds``; ``--help`` calls it by its name."""
    # A type of our own: jsonargparse's of these bounds is shared with everyone's parsers.
    bounded = type(name, (restricted_number_type(name, kind, list(bounds)),), {})

    def read(value: Any) -> Any:
        try:
            given = yaml.safe_load(value) if isinstance(value, str) else value
            if kind is int and isinstance(given, float):
                raise TypeError
            return kind(bounded(given))  # a plain number: checkpoints hold no other
        except (ValueError, TypeError, OverflowError, yaml.YAMLError):
            # The parser knows of which argument: `cli.refusal` puts it before.
            raise ConfigError(f"is {shown(value)}: must be {name}") from None

    register_type(bounded, kind, read, type_check=lambda *_: False)
    return bounded


if TYPE_CHECKING:
    NonNegativeInt = int
    PositiveInt = int
    Seed = int
    Slots = int
    Width = int
    ClosedUnitInterval = float
    FiniteFloat = float
    LeftOpenUnitInterval = float
    NonNegativeFinite = float
    PositiveFinite = float
    PositiveFloat = float
    RightOpenUnitInterval = float
    Seconds = float
    UpdateRatio = float
else:
    PositiveInt = number("PositiveInt", int, (">", 0))
    NonNegativeInt = number("NonNegativeInt", int, (">=", 0))
    Width = number("int from 1 to 65536", int, (">=", 1), ("<=", 1 << 16))
    Slots = number("int from 1 to 10^9", int, (">=", 1), ("<=", 10**9))  # 50 GB of priorities alone
    # Beyond, the seeds of demonstrations begin; numpy's generators take 32 bits.
    Seed = number("int from 0 to 2^30 - 1", int, (">=", 0), ("<", 1 << 30))
    ClosedUnitInterval = number("ClosedUnitInterval", float, (">=", 0), ("<=", 1))
    LeftOpenUnitInterval = number("float in (0, 1]", float, (">", 0), ("<=", 1))
    RightOpenUnitInterval = number("float in [0, 1)", float, (">=", 0), ("<", 1))
    PositiveFloat = number("PositiveFloat", float, (">", 0))  # or infinite
    PositiveFinite = number("finite float > 0", float, (">", 0), ("<", math.inf))
    NonNegativeFinite = number("finite float >= 0", float, (">=", 0), ("<", math.inf))
    FiniteFloat = number("finite float", float, (">", -math.inf), ("<", math.inf))
    UpdateRatio = number("float in (0, 64]", float, (">", 0), ("<=", 64))
    Seconds = number("float in (0, 1e9]", float, (">", 0), ("<=", 1e9))
