"""Values that an argument must refuse, by what the argument is."""

from __future__ import annotations

import math
from typing import Any

import torch

NO_NUMBER = ("x", [1], {}, b"1", 1j, object())
NO_OBJECT = (*NO_NUMBER, 3, 0.5)  # nothing with methods of its own
NO_NAME = ("", " ", "\n", 3, 0.5, [1], object())
NO_NAMES = ("", "  ", 3, [], [""], ["a", 3], [" "])  # neither a name nor a list of some
NO_FLAG = ("no", 0, 1, 0.0, [])
NO_DEVICE = ("abc", "cpu:x", " ", 0.5, [1])


def whole(least: int, most: int | None = None, *, or_none: bool = False) -> tuple[Any, ...]:
    """No whole number from ``least`` to ``most``; 2.0 and True are none."""
    bad = (*NO_NUMBER, True, 2.0, math.nan, math.inf, least - 1, -(10**30))
    return bad + (() if most is None else (most + 1,)) + (() if or_none else (None,))


def real(
    least: float, most: float = math.inf, *, above: bool = False, or_none: bool = False
) -> tuple[Any, ...]:
    """No finite number in [``least``, ``most``]; ``above``: ``least`` itself is bad, too."""
    bad = (*NO_NUMBER, math.nan, math.inf, -math.inf, least if above else least - 1e-9, -1e300)
    return bad + (() if most == math.inf else (most + 1e-6 * most,)) + (() if or_none else (None,))


SHARE, POSITIVE, NOT_NEGATIVE = real(0, 1), real(0, above=True), real(0)
POSITIVE_SHARE, SECONDS = real(0, 1, above=True), real(0, 1e9)
COUNT, SEED = whole(1), whole(0, 2**63 - 1)


def other_than(*choices: str, or_none: bool = False) -> tuple[Any, ...]:
    """None of the words."""
    bad = ("", "other", choices[0] + "x", 3, 0.5, list(choices[:1]))
    return bad if or_none else (*bad, None)


def slots(capacity: int) -> tuple[Any, ...]:
    """Nothing that is three slots of a ring of ``capacity``; -1 is what was not stored."""
    outside = [torch.tensor([0, 1, slot]) for slot in (-2, capacity, -(2**63), 2**63 - 1)]
    floats = [torch.zeros(3, dtype=kind) for kind in (torch.float32, torch.bool, torch.complex64)]
    return *outside, *floats, "x", {}, None


def numbers(most: float) -> tuple[Any, ...]:
    """Nothing that is three finite numbers in [0, ``most``]."""
    above = math.inf if most == math.inf else most + 1e-6
    spoilt = [torch.tensor([0.5, bad, 0.5]) for bad in (-1e-6, math.nan, above)]
    return (
        *spoilt,
        torch.zeros(2),
        torch.zeros(3, 2),
        torch.zeros(3, dtype=torch.complex64),
        {},
        "x",
    )


def tensors_but(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, ...]:
    """Tensors of other kinds, and with a dimension too many and one too few."""
    kinds = {torch.float32, torch.int64, torch.bool, torch.uint8} - {dtype}
    wrong = [torch.zeros(shape, dtype=kind) for kind in sorted(kinds, key=str)]
    return *wrong, torch.zeros(*shape, 1, dtype=dtype), torch.zeros(shape[1:], dtype=dtype)
