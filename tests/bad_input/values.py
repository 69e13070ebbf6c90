"""Values that an argument must refuse, as hypothesis strategies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

HUGE = 10**30
NO_NUMBER = st.one_of(
    st.text(max_size=12),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.builds(object),
)
NOTHING = st.none()


def real(
    least: float, most: float = math.inf, *, above: bool = False, or_none: bool = False
) -> SearchStrategy[Any]:
    """No finite number in [``least``, ``most``]; ``above``: ``least`` itself is bad, too."""
    below = st.floats(max_value=least, exclude_max=not above, allow_nan=False)
    bad = [NO_NUMBER, below, st.sampled_from([math.nan, math.inf, -math.inf])]
    if most < math.inf:
        bad.append(st.floats(min_value=most, exclude_min=True, allow_nan=False))
    return st.one_of(*bad) if or_none else st.one_of(*bad, NOTHING)


def whole(least: int, most: int = HUGE, *, or_none: bool = False) -> SearchStrategy[Any]:
    """No whole number from ``least`` to ``most``; 3.0 is none."""
    bad = [NO_NUMBER, st.floats(), st.integers(-HUGE, least - 1)]
    if most < HUGE:
        bad.append(st.integers(most + 1, HUGE))
    return st.one_of(*bad) if or_none else st.one_of(*bad, NOTHING)


def other_than(*choices: str, or_none: bool = False) -> SearchStrategy[Any]:
    """Neither of the words."""
    bad = st.one_of(
        st.text(max_size=12).filter(lambda text: text not in choices),
        st.integers(),
        st.floats(),
        st.lists(st.sampled_from(choices), max_size=2),
    )
    return bad if or_none else st.one_of(bad, NOTHING)


def flag(*, or_none: bool = False) -> SearchStrategy[Any]:
    """Neither True nor False, which "no" and 0 are not."""
    bad = st.one_of(NO_NUMBER, st.integers(), st.floats())
    return bad if or_none else st.one_of(bad, NOTHING)


def device(*, or_none: bool = False) -> SearchStrategy[Any]:
    """No device that torch knows the name of."""
    names = st.text(alphabet="abcdxyz:-_ ", max_size=9).filter(is_no_device)
    bad = st.one_of(names, st.floats(), st.lists(st.integers(), max_size=2), st.binary(max_size=3))
    return bad if or_none else st.one_of(bad, NOTHING)


def is_no_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return True
    return False


NO_NAME = st.one_of(
    st.sampled_from(["", " ", "\n"]),
    st.integers(),
    st.floats(),
    st.lists(st.integers(), max_size=2),
    st.builds(object),
)
"""Nothing that could be the name of something."""
NO_NAMES = st.one_of(
    st.sampled_from(["", "  "]),
    st.integers(),
    st.lists(st.one_of(st.integers(), st.sampled_from(["", " "])), max_size=3),
)
"""Neither a name nor a list of names."""
NO_OBJECT = st.one_of(NO_NUMBER, st.integers(), st.floats())
"""No object with methods of its own."""


@st.composite
def spoilt(draw: Any, good: Sequence[float], bad: SearchStrategy[float]) -> torch.Tensor:
    """Numbers of which one or more are bad."""
    values = list(good)
    for place in draw(st.sets(st.integers(0, len(values) - 1), min_size=1)):
        values[place] = draw(bad)
    return torch.tensor(values, dtype=torch.float64)


NO_TENSOR = st.one_of(
    st.text(max_size=6), st.dictionaries(st.integers(), st.integers(), max_size=2), NOTHING
)


def unit_values(count: int) -> SearchStrategy[Any]:
    """Nothing that is ``count`` numbers in [0, 1]."""
    outside = st.one_of(
        st.floats(max_value=0, exclude_max=True),
        st.floats(min_value=1, exclude_min=True),
        st.just(math.nan),
    )
    return st.one_of(
        spoilt([0.5] * count, outside), _lengths_but(count), NO_TENSOR, _complex(count)
    )


def sizes(count: int) -> SearchStrategy[Any]:
    """Nothing that is ``count`` finite numbers of 0 or more."""
    outside = st.one_of(
        st.floats(max_value=0, exclude_max=True), st.sampled_from([math.nan, math.inf])
    )
    return st.one_of(
        spoilt([0.5] * count, outside), _lengths_but(count), NO_TENSOR, _complex(count)
    )


def slots(count: int, capacity: int) -> SearchStrategy[Any]:
    """Nothing that is ``count`` slots of a storage of ``capacity``; -1 is what was not stored."""
    outside = st.one_of(st.integers(-(2**63), -2), st.integers(capacity, 2**63 - 1))

    @st.composite
    def spoilt_slots(draw: Any) -> torch.Tensor:
        values = list(range(count))
        for place in draw(st.sets(st.integers(0, count - 1), min_size=1)):
            values[place] = draw(outside)
        return torch.tensor(values)

    kinds = st.sampled_from([torch.float32, torch.float64, torch.bool, torch.complex64])
    others = kinds.map(lambda kind: torch.zeros(count, dtype=kind))
    return st.one_of(spoilt_slots(), others, NO_TENSOR)


def _lengths_but(count: int) -> SearchStrategy[torch.Tensor]:
    """Tensors of other shapes than ``[count]`` or ``[1]``."""
    shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3)
    wrong = shapes.filter(lambda shape: math.prod(shape) not in (1, count))
    return wrong.map(lambda shape: torch.full(shape, 0.5))


def _complex(count: int) -> SearchStrategy[torch.Tensor]:
    return st.just(torch.zeros(count, dtype=torch.complex64))


def tensors_but(dtype: torch.dtype, *shape: int | None) -> SearchStrategy[Any]:
    """Tensors of another dtype, or of another shape; None in ``shape`` is any length above 0."""
    good = [2 if length is None else length for length in shape]
    dtypes = [torch.float16, torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8]
    kinds = st.sampled_from([each for each in dtypes if each != dtype])
    shapes = st.lists(st.integers(0, 4), max_size=len(shape) + 1).filter(
        lambda other: (
            len(other) != len(shape)
            or any(
                have == 0 if want is None else have != want
                for have, want in zip(other, shape, strict=True)
            )
        )
    )
    return st.one_of(
        kinds.map(lambda kind: torch.zeros(good, dtype=kind)),
        shapes.map(lambda other: torch.zeros(other, dtype=dtype)),
    )
