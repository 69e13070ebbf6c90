"""The code and the commands of the README, and of the pages that it links to, run as they stand."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vlmrb_torchrl import AsyncScorer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = (
    ".",
    *("recipes", "recipes/benchmarks", "recipes/configs", "recipes/configs/*"),
    *("tests/recipes/configs", "vlmrb_torchrl/judge", "vlmrb_torchrl/scorers"),
)
FILES = [file for folder in PAGES for file in sorted(ROOT.glob(f"{folder}/README.md"))]
TEXT = "\n".join(file.read_text() for file in FILES)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
COMMAND = r"(?:python -m|fabric run|git|tensorboard|pip|apt-get) "

SHORT = ["--training.total_env_steps=256", "--training.warmup_env_steps=128"]
SHORT += ["--training.checkpoint_every_env_steps=128", "--training.log_every_env_steps=128"]
SHORT += ["--training.num_envs=4", "--replay.capacity=2000", "--training.progress=false"]
SHORT += ["--training.eval_episodes=1"]
STUDIED = dict(word[2:].split("=") for word in SHORT) | {"training.eval_every_env_steps": 128}
RUN = [*SHORT, "--training.eval_every_env_steps=0"]
TIMED = ["--rounds=1", "--seconds=0.01"]
PAIR = ["--pairs=1", "--env_steps=2100"]

SHORTENED = {
    **{f"recipes.{name}": RUN for name in ("dqn", "iqn", "sac", "td3")},
    "--resume": ["--training.total_env_steps=512"],
    "recipes.compare": ["--seeds=1", f"--settings={json.dumps(STUDIED)}"],
    "recipes.train_judge": [
        "--episodes=4",
        *(f"--{s}_steps=1" for s in ("frame", "event", "answer")),
    ],
    "recipes.benchmarks.environment": TIMED,
    "recipes.benchmarks.rendering": [*TIMED, "--clips=1"],
    "recipes.benchmarks.sampler": [*TIMED, "--slots=[1000]"],
    "recipes.benchmarks.scene": [*TIMED, "--pixels=[64]", "--workers=[1]"],
    "recipes.benchmarks.scoring": ["--rounds=1", "--clips=16"],
    "recipes.benchmarks.soak": ["--minutes=0.4", "--replay_capacity=3000"],
    "recipes.benchmarks.training": PAIR,
    "recipes.benchmarks.update": [*TIMED, "--compile=false"],
    "vlmrb_torchrl.judge": ["--clips=16", "--resamples=20"],
}
"""What makes a command short: appended, it counts instead of what stands before."""

PLAN = """
import os, sys
sys.path[0] = os.getcwd()  # as with -m: a name, not wherever one is
from recipes import compare
compare.execute = lambda *_: sys.exit()
compare.main()
"""
PLANNED = {
    "--first_seed": "differs from the one that is run by its arguments",
    "half_cheetah": "differs from the one that is run by its arguments",
}
"""Comparisons whose runs are all built, and none is trained."""

PARSED = {
    "facebook/Perception-LM-1B": "downloads a model",
    "ogbench/vlm_rb.yaml": "downloads a model",
    "localhost:8000": "asks a server",
    "--device cuda": "wants a GPU",
    "recipes.benchmarks.peers": "wants Stable-Baselines3",
}
"""Their arguments are read and checked, and nothing is run."""

LEFT_OUT = {
    "python -m venv": "makes the environment that the tests are given",
    "pip install": "wants the network",
    "tox run": "wants the network; what it runs is tested here or is the tests themselves",
    "apt-get": "wants the network",
    "tests.scorers.family_table": "takes a quarter of an hour; tests/scorers has its parts",
}


def commands():
    """Those of the shell's blocks, one for each line, and those in the text."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in blocks.splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
    return list(dict.fromkeys([*lines, *(code for code in inline if re.match(COMMAND, code))]))


def matching(table, command):
    return next((value for part, value in table.items() if part in command), None)


def shortened(command):
    """The words of a command that says the same and ends soon."""
    words = shlex.split(command)
    if matching(PARSED, command):
        return [*words, "--print_config"]
    if words[0] == "git":
        return words
    if words[0] == "tensorboard":
        return [*words, "--inspect"]  # else it serves until it is stopped
    module = words[2] if words[0] == "python" else f"recipes.{Path(words[4]).stem}"
    if "--resume" in words:
        return [*words, *SHORTENED["--resume"]]
    if module == "recipes.compare" and matching(PLANNED, command):
        return ["python", "-c", PLAN, *words[3:]]
    return [*words, *SHORTENED[module]]


def test_pages_link_to_what_is_there():
    """Pages and pictures; what lies on the web is not asked for."""
    for file in [*FILES, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]:
        links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", file.read_text())
        for link in filter(None, (link for pair in links for link in pair)):
            assert link.startswith("https://") or (file.parent / link).exists(), (file, link)


def test_readme_has_code_and_commands():
    assert BLOCKS
    assert len(commands()) > 30


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(number, monkeypatch):
    """Each block is a script of its own; what it asserts itself is checked by running it."""
    monkeypatch.setattr(AsyncScorer.drain, "__defaults__", (600.0,))  # on a busy machine
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"__name__": "readme"})


def test_what_the_readme_installs_and_the_environments_of_tox_exist():
    named = re.findall(r"pip install -e '\.\[(.*?)\]'", README)
    assert named
    known = PROJECT["project"]["optional-dependencies"].keys()
    assert set(",".join(named).split(",")) <= known
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    known = {name for section in tox.sections() for name in re.findall(r"\w+", section)}
    assert set(",".join(re.findall(r"tox run -e ([\w,]+)", README)).split(",")) <= known


def test_an_installed_package_has_every_file_of_settings():
    recipes, patterns = ROOT / "recipes", PROJECT["tool"]["setuptools"]["package-data"]["recipes"]
    installed = {path for pattern in patterns for path in recipes.glob(pattern)}
    assert installed == set(recipes.rglob("*.yaml"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that a clone would have, and nothing else."""
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no clone of a git repository")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if not matching(LEFT_OUT, c)])
def test_readme_command_runs_in_a_clean_clone(command, clone):
    """One after the other in one clone, as a reader gives them; no PYTHONPATH helps."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    words = shortened(command)
    done = subprocess.run(
        words, cwd=clone, env=env, capture_output=True, text=True, timeout=1200, check=False
    )
    if words[0] == "git":  # says by 1 that the files differ
        assert done.returncode == 1
        assert "+class IQN" in done.stdout
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "is hardly learnt" not in done.stderr
