"""What a model is read from, what is refused, and what an error says."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.scorers.families import save
from vlmrb_torchrl.scorers import HuggingFaceScorer

# A fresh interpreter in which one package seems not to be installed: transformers looks once.
WITHOUT = """
import importlib.metadata, importlib.util, sys
hidden, folder = sys.argv[1:]
find, version = importlib.util.find_spec, importlib.metadata.version
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.util.find_spec = lambda n, *a: None if n.split(".")[0] == hidden else find(n, *a)
importlib.metadata.version = lambda n: missing(n) if n == hidden else version(n)
sys.modules[hidden] = None
from vlmrb_torchrl.scorers import HuggingFaceScorer
try:
    HuggingFaceScorer(folder).load()
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


@pytest.mark.parametrize(
    ("package", "family"),
    [
        ("transformers", "qwen3_vl"),
        ("torchvision", "qwen3_vl"),
        ("timm", "perception_lm"),
        ("num2words", "smolvlm"),
    ],
)
def test_missing_package_is_named_in_one_line_with_the_remedy(
    tmp_path: Path, package: str, family: str
) -> None:
    command = [sys.executable, "-c", WITHOUT, package, str(save(family, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert package in line.lower()
    assert "pip install 'vlmrb-torchrl[vlm]'" in line


def test_missing_attention_package_is_named_with_the_remedy(folder: Path) -> None:
    with pytest.raises(ImportError, match="pip install flash-attn, or attention='sdpa'"):
        HuggingFaceScorer(folder, attention="flash_attention_2").load()


def test_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors.*save_pretrained"):
        HuggingFaceScorer(tmp_path)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)


def test_pickle_beside_safetensors_is_not_opened(tmp_path: Path) -> None:
    folder = save("qwen3_vl", tmp_path / "model")
    mark = tmp_path / "opened"
    torch.save({"weight": Bomb(str(mark))}, folder / "pytorch_model.bin")
    HuggingFaceScorer(folder).load()
    assert not mark.exists()


def with_code_of_its_own(folder: Path, mark: Path) -> Path:
    save("qwen3_vl", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    return folder


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = with_code_of_its_own(tmp_path / "model", mark)
    with pytest.raises(ValueError, match="custom code"):
        HuggingFaceScorer(folder).load()
    assert not mark.exists()


def test_who_asks_for_remote_code_is_told_what_it_means(folder: Path) -> None:
    with pytest.warns(UserWarning, match="will run with your rights; read it, and pin it"):
        HuggingFaceScorer(folder, trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HuggingFaceScorer(folder)


def test_folder_without_a_processor_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save("qwen3_vl", tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="save both with save_pretrained") as error:
        HuggingFaceScorer(folder).load()
    assert "\n" not in str(error.value)


def test_revision_and_fingerprint_follow_the_weights_and_not_the_place(tmp_path: Path) -> None:
    one, same, other = (save("qwen3_vl", tmp_path / name) for name in ("one", "same", "other"))
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    scorers = [HuggingFaceScorer(folder) for folder in (one, same, other)]
    assert {scorer.revision for scorer in scorers} == {""}
    for scorer in scorers:
        scorer.load()
    revisions = [scorer.revision for scorer in scorers]
    assert revisions[0] == revisions[1] != revisions[2]
    again = HuggingFaceScorer(one)
    again.load()
    assert again.fingerprint == scorers[0].fingerprint
    assert again.asking("Is it?").fingerprint != again.fingerprint
