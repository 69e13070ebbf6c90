"""Command lines from signatures: numbers with a range as types, and programs of one function.

    def __init__(self, env: EnvBase, *, gamma: RightOpenUnitInterval = 0.95) -> None:

``--help`` names the range. Only the command line checks; what reaches a class is a plain number.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentError, auto_cli, set_parsing_settings
from jsonargparse.typing import register_type

from vlmrb_torchrl.checks import ConfigError, one_line, shown

set_parsing_settings(unset_sentinel=True)  # null is a value, and as such checked

_KEY = r'Parser key "([^"]+)"'
_HOLDS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def number(name: str, kind: type, *bounds: tuple[str, float]) -> Any:
    """Build a type of numbers of ``kind`` within ``bounds``; ``--help`` calls it by its name."""
    # Not jsonargparse's own: these leave numbers of a subclass, which no checkpoint can hold.
    bounded = type(name, (kind,), {})

    def read(value: Any) -> Any:
        try:
            given = yaml.safe_load(value) if isinstance(value, str) else value
            if isinstance(given, bool) or (kind is int and isinstance(given, float)):
                raise TypeError
            plain = kind(given)
            if not all(_HOLDS[sign](plain, bound) for sign, bound in bounds):
                raise ValueError
            return plain
        except (ValueError, TypeError, OverflowError, yaml.YAMLError):
            # The parser knows of which argument: `refusal` puts it before.
            raise ConfigError(f"is {shown(value)}: must be {name}") from None

    register_type(bounded, kind, read, type_check=lambda *_: False)
    return bounded


def refusal(error: Exception) -> str:
    """Say in one line what a command line was refused for."""
    text = one_line(error)
    if text.startswith("is "):  # a number of the types here
        text = f"{'.'.join(re.findall(_KEY, str(error)))} {text}"
    return text


def program(function: Callable[..., Any], argv: list[str] | None = None) -> None:
    """Call ``function`` with what the command line says; a refusal is one line."""
    try:
        auto_cli(function, args=argv, as_positional=False, exit_on_error=False)
    except (ArgumentError, ConfigError) as error:
        script = Path(sys.argv[0])
        name = script.parent.name if script.stem == "__main__" else script.stem
        sys.exit(f"{name}: {refusal(error)}")


if TYPE_CHECKING:
    NonNegativeInt = int
    PositiveInt = int
    Seed = int
    Slots = int
    Width = int
    ClosedUnitInterval = float
    FiniteFloat = float
    FromOne = float
    LeftOpenUnitInterval = float
    NonNegativeFinite = float
    PositiveFinite = float
    PositiveFloat = float
    RightOpenUnitInterval = float
    Seconds = float
    UpdateRatio = float
else:
    PositiveInt = number("int > 0", int, (">", 0))
    NonNegativeInt = number("int >= 0", int, (">=", 0))
    Width = number("int from 1 to 65536", int, (">=", 1), ("<=", 1 << 16))
    Slots = number("int from 1 to 10^9", int, (">=", 1), ("<=", 10**9))  # 50 GB of priorities alone
    # Beyond, the seeds of demonstrations begin; numpy's generators take 32 bits.
    Seed = number("int from 0 to 2^30 - 1", int, (">=", 0), ("<", 1 << 30))
    ClosedUnitInterval = number("float in [0, 1]", float, (">=", 0), ("<=", 1))
    LeftOpenUnitInterval = number("float in (0, 1]", float, (">", 0), ("<=", 1))
    RightOpenUnitInterval = number("float in [0, 1)", float, (">=", 0), ("<", 1))
    PositiveFloat = number("float > 0", float, (">", 0))  # or infinite
    PositiveFinite = number("finite float > 0", float, (">", 0), ("<", math.inf))
    NonNegativeFinite = number("finite float >= 0", float, (">=", 0), ("<", math.inf))
    FiniteFloat = number("finite float", float, (">", -math.inf), ("<", math.inf))
    FromOne = number("finite float >= 1", float, (">=", 1), ("<", math.inf))
    UpdateRatio = number("float in (0, 64]", float, (">", 0), ("<=", 64))
    Seconds = number("float in (0, 1e9]", float, (">", 0), ("<=", 1e9))
