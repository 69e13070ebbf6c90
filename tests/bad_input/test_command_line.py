"""The command line refuses in one line what its settings refuse, before anything is built."""

from __future__ import annotations

import contextlib
import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from recipes.dqn import DQN
from recipes.running import cli
from tests.bad_input import recipe_rows, values
from tests.bad_input.test_bad_input import tried

GROUPS = {
    "training": "Training",
    "scoring": "Scoring",
    "replay": "VLMGuided",
    "env": "DoorKey",
    "demonstrations": "Demonstrations",
    "algorithm": "DQN",
}
BAD = {
    f"{group}.{name}": bad
    for group, row in GROUPS.items()
    for name, bad in recipe_rows.ROWS[row]().bad.items()
}
WORDS = st.text(string.ascii_lowercase, min_size=3, max_size=9).filter(
    lambda word: word not in ("null", "true", "false", "yes", "off", "nan", "inf")
)


def as_text(value: Any) -> str | None:
    """How a value is written on a command line; None where it would be read as another."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, str(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple, dict)):
        # The parser takes "1" for 1, and its refusal cannot show a text of blanks.
        if any(isinstance(each, str) and not each.isalpha() for each in value):
            return None
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return None
    return None


@pytest.fixture(scope="module")
def parser() -> Any:
    return cli.build_parser(DQN)


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch, parser: Any) -> None:
    monkeypatch.setattr(cli, "launch", lambda *_, **__: pytest.fail("something was launched"))
    monkeypatch.setattr(cli, "build_parser", lambda _: parser)


def refusal(*argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.run(DQN, list(argv))
    assert isinstance(ended.value.code, str), f"{argv} ended with {ended.value.code!r}"
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


@pytest.mark.parametrize("argument", BAD)
def test_bad_value_of_an_argument_is_refused(argument: str) -> None:
    def refuse(text: str) -> None:
        said = refusal(f"--{argument}={text}")
        assert argument.split(".")[1] in said
        assert any(form in said for form in forms(text)), f"{text!r} is not shown: {said}"

    tried(refuse, texts(BAD[argument]), argument, examples=6)


def texts(bad: SearchStrategy[Any]) -> SearchStrategy[str]:
    # A number that is whole would be taken for an int: "3.0" is none for Python, but is for YAML.
    kept = bad.filter(lambda v: not (isinstance(v, float) and v.is_integer() and v >= 1))
    return st.one_of(WORDS, kept.map(as_text).filter(bool).map(str))


def forms(text: str) -> list[str]:
    """How a refusal may show what was written, which the parser has read by then."""
    read = yaml.safe_load(text)
    found = [text, str(read), repr(read)]
    if isinstance(read, (int, float)) or text.startswith((".", "-.")):
        found += [str(float(str(read).replace(".inf", "inf"))), "inf", "nan"]
    if isinstance(read, list):
        found += [str(tuple(read)), *(str(each) for each in read)]
    with contextlib.suppress(ValueError):
        found.append(str(float(text)))
    return found


def test_unknown_settings_are_refused() -> None:
    unknown = st.text("xyz", min_size=1, max_size=6)
    keys = st.one_of(unknown, st.tuples(st.sampled_from(sorted(GROUPS)), unknown).map(".".join))

    def refuse(key: str) -> None:
        assert key.rsplit(".", maxsplit=1)[-1] in refusal(f"--{key}=1")

    tried(refuse, keys, "unknown settings", examples=40)


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    leaf = st.one_of(st.integers(), st.floats(), WORDS, st.none())
    trees = st.recursive(
        leaf, lambda inner: st.dictionaries(WORDS, inner, min_size=1), max_leaves=6
    )
    file = tmp_path / "settings.yaml"

    def refuse(content: Any) -> None:
        file.write_text(yaml.dump(content))
        refusal(f"--config={file}")

    tried(refuse, st.dictionaries(WORDS, trees, min_size=1, max_size=3), "files", examples=40)


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"

    def refuse(content: bytes) -> None:
        file.write_bytes(content)
        refusal(f"--config={file}")

    bad = st.one_of(
        st.binary(min_size=1, max_size=20).map(lambda rest: b"\xff\xfe\xff" + rest),
        WORDS.map(lambda word: f"{word}: [1, 2".encode()),
        WORDS.map(lambda word: f"- {word}\n".encode()),
        WORDS.map(lambda word: word.encode()),
    )
    tried(refuse, bad, "no YAML", examples=40)


def test_devices_that_are_none_are_refused() -> None:
    def refuse(name: str) -> None:
        judge = f"{{class_path: EmbeddedJudge, init_args: {{device: {json.dumps(name)}}}}}"
        assert "device" in refusal(f"--scoring.scorer={judge}")

    names = st.text(string.ascii_lowercase, min_size=3, max_size=7).filter(values.is_no_device)
    tried(refuse, names, "devices", examples=20)
