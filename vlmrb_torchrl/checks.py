"""Refusing bad input in one line, before anything is built or changed."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MOST_SECONDS = 1e9
"""Thirty years: the longest time that may be waited for; the system's own clocks overflow later."""
_SHOWN = 120  # characters of a value


class ConfigError(ValueError):
    """A value of the configuration that cannot work; its text names the value and the remedy."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Refuse ``value`` of the setting ``name`` unless ``condition`` holds.

    Raises:
        ConfigError: In one line, with the setting, its value and the remedy.

    Example:
        >>> require(0 <= 0.5 <= 1, "replay.lmbda", 0.5, "use a number from 0 to 1")
    """
    if not condition:
        raise ConfigError(f"{name} is {shown(value)}: {remedy}")


def is_whole(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether ``value`` is a whole number in [``least``, ``most``]; a bool is none.

    Example:
        >>> is_whole(3, 1), is_whole(3.0, 1), is_whole("3", 1), is_whole(0, 1)
        (True, False, False, False)
    """
    whole = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    return whole and bool(least <= value <= most)


def is_real(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether ``value`` is a finite number in [``least``, ``most``]; a bool is none.

    Example:
        >>> is_real(0.5, 0, 1), is_real(float("nan")), is_real("0.5"), is_real(2, 0, 1)
        (True, False, False, False)
    """
    real = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    greatest = sys.float_info.max
    return real and bool(max(least, -greatest) <= value <= min(most, greatest))


def is_positive(value: Any, most: float = math.inf) -> bool:
    """Whether ``value`` is a finite number above 0, up to ``most``."""
    return is_real(value, 0.0, most) and bool(value > 0)


def is_key(value: Any) -> bool:
    """Whether ``value`` can name an entry of a TensorDict: a string, or a tuple of them."""
    parts = value if isinstance(value, tuple) else (value,)
    return bool(parts) and all(isinstance(part, str) and bool(part.strip()) for part in parts)


def checked_seconds(timeout_s: Any) -> float:
    """Return ``timeout_s``, refused if it is no time that can be waited for."""
    fits = is_real(timeout_s, 0, MOST_SECONDS)
    require(fits, "timeout_s", timeout_s, f"wait 0 to {MOST_SECONDS:g} seconds")
    return float(timeout_s)


def checked_device(device: Any, *, here: bool = False) -> torch.device:
    """Return the device that ``device`` names, refused if it names none.

    Args:
        device: As torch names it.
        here: Refuse one that this machine lacks, too, and return it with its ordinal, as tensors
            report it: "cuda" is not equal to "cuda:0".
    """
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(
            f"device is {shown(device)}: name one of torch's, such as cpu or cuda:0"
        ) from None
    try:
        return torch.empty(0, device=named).device if here else named
    except Exception as error:  # torch says it in a different one for each kind of device
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {named}: name one that is here ({reason})") from None


def shown(value: object) -> str:
    """``value`` in one line of moderate length; of a tensor what it is, not what it holds."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    line = " ".join(str(value).split()) or repr(value)
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "…"


def one_line(error: BaseException) -> str:
    """Reduce a parser's report to the line that names the value and the remedy."""
    cause: BaseException | None = error
    seen: set[int] = set()  # an error that is raised once more may be its own context
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, ConfigError):
            return str(cause)
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)
