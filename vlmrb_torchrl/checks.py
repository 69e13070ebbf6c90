"""Refusing a bad configuration in one line, before anything is built."""

from __future__ import annotations


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
        raise ConfigError(f"{name} is {value}: {remedy}")


def one_line(error: BaseException) -> str:
    """Reduce a parser's report to the line that names the value and the remedy."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)
