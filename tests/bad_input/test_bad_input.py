"""Bad input is refused in one line that names the value and the remedy, and leaves no trace.

The rows of ``*_rows.py`` say which callables there are and what each of their arguments must
refuse; every argument gets `EXAMPLES` random values, drawn from `SEED`.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.bad_input import recipe_rows, replay_rows, scorer_rows, world_rows
from tests.bad_input.case import check_refusal

ROWS = {**replay_rows.ROWS, **scorer_rows.ROWS, **world_rows.ROWS, **recipe_rows.ROWS}
EXAMPLES = int(os.environ.get("BAD_INPUT_EXAMPLES", "50"))
SEED = int(os.environ.get("BAD_INPUT_SEED", random.randrange(2**32)))
REFUSED: Counter[str] = Counter()


@pytest.mark.parametrize("name", ROWS)
def test_good_arguments_are_taken(name: str) -> None:
    """Else a refusal might be of something else than the bad value."""
    row = ROWS[name]()
    row.call(**row.good())


@pytest.mark.parametrize("name", ROWS)
def test_every_bad_value_is_refused(name: str) -> None:
    row, threads = ROWS[name](), threading.active_count()
    for argument, bad in row.bad.items():
        called, secret = row.called.get(argument, argument), argument in row.secret

        def refuse(
            value: Any, argument: str = argument, called: str = called, secret: bool = secret
        ) -> None:
            check_refusal(row.refusal(argument, value), called, value, secret)

        REFUSED[name] += tried(refuse, bad, f"{name} {argument}")
    assert threading.active_count() == threads


def tried(refuse: Any, bad: SearchStrategy[Any], label: str, examples: int = EXAMPLES) -> int:
    """Let ``refuse`` refuse random values; how many."""
    count = 0

    @seed(SEED)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(bad)
    def each(value: Any) -> None:
        nonlocal count
        count += 1
        refuse(value)

    print(f"{label}: BAD_INPUT_SEED={SEED}")
    each()
    return count


def test_ten_thousand_bad_values_were_refused() -> None:
    if set(REFUSED) != set(ROWS):
        pytest.skip("counts only when all rows were tried before it")
    print(f"{REFUSED.total()} bad values, {sum(len(ROWS[name]().bad) for name in ROWS)} arguments")
    assert REFUSED.total() >= 10_000
