"""The results of a study as one tidy table: a row per evaluation of each run."""

from __future__ import annotations

import csv
import json
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from recipes.running.checkpoint import flat
from recipes.running.metrics import read_rows
from recipes.running.runs import RECORD
from vlmrb_torchrl.checks import require

PLACE = ("study", "algorithm", "task", "method", "judge", "variant", "seed")
MEASURES = ("env_steps", "seconds", "success", "return", "length")
ORIGIN = ("version", "commit", "date", "machine", "cores", "torch")
OWN = {"training.seed", "training.log_dir", "training.name", "training.progress"}

Rows = list[dict[str, Any]]


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run, by the names that they have on its command line."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if not class_of(config["replay"]["class_path"]).uses_scores:
        del config["scoring"]  # which is not read
    saved = flat(config)
    names = {name: name.replace(".init_args", "").removesuffix(".class_path") for name in saved}
    return {names[name]: value for name, value in saved.items() if name not in OWN}


def class_of(path: str) -> Any:
    """The class of an import path."""
    module, name = path.rsplit(".", maxsplit=1)
    return getattr(import_module(module), name)


def crossed(grid: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of the values of some settings, by a name for each."""
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return {
        ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in each.items()): each
        for each in combinations
        if each
    }


def evaluations_of(folder: Path) -> Rows:
    """The evaluations of a run, its place in the study and its origin in each row."""
    record = json.loads((folder / RECORD).read_text())
    rows = [row for row in read_rows(folder) if "eval/return" in row]
    require(bool(rows), f"the evaluations of {folder}", 0, "let it evaluate once at least")
    place, origin = ({name: record[name] for name in names} for names in (PLACE, ORIGIN))
    measured = [
        {name: row.get(name, row.get(f"eval/{name}", "")) for name in MEASURES} for row in rows
    ]
    origin["date"] = origin["date"][:10]
    return [{**place, **measures, **origin} for measures in measured]


def write_results(folders: list[Path], out: Path) -> Rows:
    """Write ``results.csv`` and ``settings.json``; return the rows of the former.

    The settings that differ between the runs are columns. What is the same in all that have it,
    some sixty settings, would make the table many times as large: it is in ``settings.json``.

    Args:
        folders: Of finished runs.
        out: Where the files go.
    """
    settings = [settings_of(folder) for folder in folders]
    shared = {name: value for each in settings for name, value in each.items()}
    varied = [
        name
        for name, value in shared.items()
        if any(each.get(name, value) != value for each in settings)
    ]
    shared = {name: value for name, value in shared.items() if name not in varied}
    rows = [
        {**row, **{name: own.get(name, "") for name in varied}}
        for folder, own in zip(folders, settings, strict=True)
        for row in evaluations_of(folder)
    ]
    (out / "settings.json").write_text(json.dumps(shared, indent=1) + "\n")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: text_of(value) for name, value in row.items()})
    return rows


def text_of(value: Any) -> Any:
    """A value as it stands in the table."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else value


def unscored(folders: list[Path]) -> list[str]:
    """Say in a line which runs lost clips, and how many; nothing if none did."""
    lost = []
    for folder in folders:
        rows = [row for row in read_rows(folder) if "scoring/clips_submitted" in row]
        clips = rows[-1] if rows else {}
        n = clips.get("scoring/clips_dropped", 0) + clips.get("scoring/clips_failed", 0)
        if n:
            lost.append(f"{folder.name} {n:.0f} of {clips['scoring/clips_submitted']:.0f}")
    return [f"Clips that got no score: {', '.join(lost)}."] if lost else []
