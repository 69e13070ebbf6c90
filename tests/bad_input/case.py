"""A callable, arguments that it takes, and for some of them values that it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis.strategies import SearchStrategy
from tensordict import TensorDictBase

from vlmrb_torchrl.checks import quoted, shown


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: Of the callable.
        call: The callable; takes keyword arguments.
        good: Builds arguments that it accepts.
        bad: By argument, the values that it must refuse.
        state: What a refused call must leave as it is.
        called: How the refusal names an argument, where it is not by the argument's own name.
        kinds: What it may raise.
        secret: Arguments whose value no message may show.
    """

    name: str
    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    bad: dict[str, SearchStrategy[Any]]
    state: Callable[[], Any] = lambda: None
    called: dict[str, str] = field(default_factory=dict)
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError)
    secret: frozenset[str] = frozenset()

    def refusal(self, argument: str, value: Any) -> str:
        """Call with one bad argument; return the refusal, after looking at its kind and state."""
        before = frozen(self.state())
        try:
            self.call(**{**self.good(), argument: value})
        except self.kinds as error:
            assert frozen(self.state()) == before, "the refused call left a trace"
            return str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise AssertionError(f"{self.name} took {argument}={value!r}")


def check_refusal(text: str, name: str, value: Any, secret: bool = False) -> None:
    """One line that names the argument and, unless it is a secret, the value, and says more."""
    assert len(text.splitlines()) == 1, f"more than a line: {text!r}"
    assert len(text) <= 600, f"{len(text)} characters: {text}"
    assert name in text, f"{name} is not named: {text}"
    rest = text.replace(name, "", 1)
    if secret:
        assert not isinstance(value, str) or len(value) < 4 or value not in text, text
    elif not isinstance(value, (torch.Tensor, TensorDictBase, dict)):
        assert any(form in rest for form in forms(value)), f"{value!r} is not shown: {text}"
        for form in forms(value):
            rest = rest.replace(form, "", 1)
    assert sum(word.isalpha() for word in rest.split()) >= 2, f"no remedy: {text}"


def forms(value: Any) -> tuple[str, ...]:
    """How a message may show a value."""
    whole = (shown(value), quoted(value)[1:-1], " ".join(repr(value).split()))
    return tuple(form[:60] for form in whole)


def frozen(value: Any) -> Any:
    """A copy that compares by content."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().cpu().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, TensorDictBase):
        value = dict(value.items(include_nested=True, leaves_only=True))
    if isinstance(value, dict):
        return {str(key): frozen(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(each) for each in value]
    return value
