"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_has_code():
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(number):
    """Each block is a script of its own; what it asserts itself is checked by running it."""
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"__name__": "readme"})
