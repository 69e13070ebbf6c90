"""Studies: replay methods over tasks, algorithms, judges and seeds, in parallel, with intervals.

    python -m recipes.compare                                             # the demo
    python -m recipes.compare --config recipes/configs/demo.yaml --report # of what lies finished
    python -m recipes.compare --methods '[uer, vlm_rb]' --seeds 10 --first_seed 100

Each run is a process of its own.  Ctrl-C stops them; the same command goes on with the runs
that are not finished, each from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from recipes.arguments import PositiveFloat, PositiveInt, Seed, refusal
from recipes.running.checkpoint import locked
from recipes.running.cli import CONFIGS, advice, build_parser, rehearse, tuned
from recipes.running.results import class_of, crossed, unscored, write_results
from recipes.running.runs import Run, execute, name_of
from vlmrb_torchrl.checks import ConfigError, require

METHODS = CONFIGS / "methods"
DEMO = CONFIGS / "demo.yaml"


@dataclass
class Study:
    """Train every method on every task and seed, then print tables and draw figures.

    A study is one YAML file, given by --config; arguments count instead of what it says. Without
    any argument it is recipes/configs/demo.yaml. Runs that lie finished are not repeated, those
    that were stopped go on, and what a study is extended by is all that is run.

    Args:
        name: Name of the study.
        about: What it shows, in a sentence or two, above its tables and curves.
        algorithms: Recipes: dqn, iqn, sac, td3.
        tasks: Folders of recipes/configs, or paths of folders, relative to the study's file. Their
            ALGORITHM.yaml holds what all methods share; METHOD.yaml in their folder ALGORITHM, if
            there is one, is laid over the method: how it was tuned there.
        methods: Names in recipes/configs/methods, or paths of YAML files, relative to the study's
            file, named by their stems. Differences are taken against uer and those of PER: per,
            per_unweighted, per_alpha_1, per_computed.
        judges: For every method that uses scores, in turn: such names or paths, too, of which the
            section "scoring" counts; or settings by names, such as {"half of it":
            {scoring.dropped_share: 0.5}}. None: each method's own judge.
        grid: Two settings of the judge and the values of each, such as {scoring.dropped_share: [0,
            0.5], scoring.delay_env_steps: [0, 1000]}: all combinations are judges, too, and what
            each makes of a method is drawn as a map.
        variants: Settings to vary, such as {"1 per 8": {training.updates_per_env_step: 0.125}}: by
            each name what departs from ``settings``.
        seeds: Runs per method.
        first_seed: The seeds are ``first_seed``, ``first_seed + 1``, …
        settings: Settings of all runs, such as {training.total_env_steps: 50000}.
        hours: Hours until the runs are stopped, to be gone on with by the same command; null: none.
        jobs: Runs at a time; null: one for each core.
        out: Folder of logs, results, tables and figures; null: runs/NAME.
    """

    name: str = "compare"
    about: str = ""
    algorithms: list[str] = field(default_factory=lambda: ["dqn"])
    tasks: list[str] = field(default_factory=lambda: ["doorkey_6x6"])
    methods: list[str] = field(default_factory=lambda: ["uer", "per", "vlm_rb"])
    judges: list[str] | dict[str, dict[str, Any]] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: PositiveInt = 3
    first_seed: Seed = 0
    settings: dict[str, Any] = field(default_factory=dict)
    hours: PositiveFloat | None = None
    jobs: PositiveInt | None = None
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder of the study's runs and results."""
        return self.out or Path("runs") / self.name


def plan(study: Study, here: Path = Path()) -> list[Run]:
    """List the runs, seed by seed, so that every method meets the same load of the machine.

    Args:
        study: What to run.
        here: Folder that its paths start from.
    """
    for name in ("algorithms", "tasks", "methods"):
        require(bool(getattr(study, name)), name, getattr(study, name), "name at least one")
    known = {path.stem: path for path in sorted(METHODS.glob("*.yaml"))}
    methods = found("methods", study.methods, known, here)
    judges = study.judges
    if not isinstance(judges, dict):
        files_of_judges = found("judges", judges, known, here)
        judges = {name: {"scoring": scoring_of(file)} for name, file in files_of_judges.items()}
    require(len(study.grid) in (0, 2), "grid", list(study.grid), "name two settings, or none")
    judges = judges | crossed(study.grid)
    folders = [file.parent for algorithm in study.algorithms for file in tuned(algorithm)]
    tasks = found("tasks", study.tasks, {folder.name: folder for folder in folders}, here)
    variants = study.variants or {"": {}}
    own_judge: dict[str, dict[str, Any]] = {"": {}}
    for what, names in (("judges", judges), ("variants", variants)):
        distinct(what, list(map(name_of, names)))
    cells: list[tuple[dict[str, Any], list[str]]] = []
    for folder, algorithm, variant in product(tasks.values(), study.algorithms, variants):
        shared = folder / f"{algorithm}.yaml"
        require(shared.is_file(), "tasks", folder, f"it should hold {shared.name}")
        for method, overlay in methods.items():
            files = [shared, overlay]
            as_tuned = folder / algorithm / overlay.name
            if overlay.parent == METHODS and as_tuned.is_file():
                files.append(as_tuned)
            command = [sys.executable, "-m", f"recipes.{algorithm}"]
            command += [word for file in files for word in ("--config", str(file))]
            judged = judges and uses_scores(algorithm, command[3:])
            for judge, said in (judges if judged else own_judge).items():
                place = {"study": study.name, "algorithm": algorithm, "task": folder.name}
                place |= {"method": method, "judge": judge, "variant": variant}
                layers = said, study.settings, variants[variant]
                words = [word for layer in layers for word in arguments(layer)]
                cells.append((place, [*command, *words]))
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    return [
        Run.of_seed(place, command, seed, study.folder)
        for seed in seeds
        for place, command in cells
    ]


def found(what: str, given: list[str], known: dict[str, Path], here: Path) -> dict[str, Path]:
    """The files or folders that are given by names or paths, by their names."""
    paths = {each: known.get(each, here / each) for each in given}
    for each, path in paths.items():
        require(path.exists(), what, each, f"use some of {', '.join(known)}, or paths")
    distinct(what, [path.stem for path in paths.values()])
    return {path.stem: path for path in paths.values()}


def distinct(what: str, names: list[str]) -> None:
    """Refuse names of which two are alike: a run's folder is named by them."""
    require(len(set(names)) == len(names), what, names, "give each another name")


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as the words of a command line."""
    written = {name: v if isinstance(v, str) else json.dumps(v) for name, v in settings.items()}
    return [f"--{name}={value}" for name, value in written.items()]


def scoring_of(judge: Path) -> dict[str, Any]:
    """What the file of a judge says of scoring."""
    scoring: dict[str, Any] = (yaml.safe_load(judge.read_text()) or {}).get("scoring", {})
    require(bool(scoring), "judges", judge, "it should have a section scoring")
    return scoring


def recipe_of(algorithm: str) -> Any:
    """The LightningModule class of a recipe."""
    return getattr(import_module(f"recipes.{algorithm}"), algorithm.upper())


@cache
def _parser(algorithm: str) -> Any:
    return build_parser(recipe_of(algorithm))


def uses_scores(algorithm: str, argv: list[str]) -> bool:
    """Whether the replay method that a command line names is guided by a judge."""
    return bool(class_of(_parser(algorithm).parse_args(argv).replay.class_path).uses_scores)


def check(runs: list[Run]) -> set[str]:
    """Refuse what a run would refuse at its start, or only the report at the end.

    Returns:
        What the runs would be advised.
    """
    said = set()
    for run in {run.cell: run for run in runs}.values():  # seeds do not differ
        recipe = recipe_of(run.place["algorithm"])
        try:
            settings = rehearse(recipe, run.command[3:])
        except ConfigError as error:
            raise ConfigError(f"{run.folder.name}: {error}") from error
        every = settings.training.eval_every_env_steps
        require(every > 0, "training.eval_every_env_steps", every, "evaluations are compared")
        said.add(advice(recipe, settings))
    return said - {""}


def compare(study: Study, here: Path = Path(), *, report: bool = False) -> None:
    """Run what is not finished of a study, and report.

    Args:
        study: What to run.
        here: Folder that its paths start from.
        report: Run nothing, report what lies finished.

    Raises:
        ConfigError: At the end, if runs have failed or none is finished.
    """
    from recipes.running.report import report as report_on  # matplotlib and scipy: --help does

    console, runs, out = Console(), plan(study, here), study.folder
    unfinished = [run for run in runs if not run.finished()]
    done = len(runs) - len(unfinished)
    console.print(f"{done} of {len(runs)} runs lie finished in {out}", soft_wrap=True)
    with locked(out):
        if not report:
            for advised in check(unfinished):
                console.print(advised, soft_wrap=True)
            execute(runs, study.jobs or len(os.sched_getaffinity(0)), study.hours, console)
        cells = list(dict.fromkeys(run.cell for run in runs))
        ordered = sorted(runs, key=lambda run: cells.index(run.cell))
        finished = [run.folder for run in ordered if run.finished()]
        missing = [run.folder.name for run in ordered if run.folder not in finished]
        notes = unscored(finished)
        if missing:
            number = f"{len(missing)} of {len(runs)} runs"
            notes.append(f"{number} are not finished and in no figure: {', '.join(missing)}.")
        if finished:
            rows = write_results(finished, out)
            report_on(rows, out, study.about, notes, console, study.grid)
    failed = [run.failure for run in runs if run.failure]
    for failure in failed:
        console.print(failure, soft_wrap=True, markup=False, highlight=False)
    if failed:
        raise ConfigError(f"{len(failed)} runs failed: the same command tries them again")
    if not finished:
        raise ConfigError(f"no run has finished in {out}: the same command goes on")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    # Ended from outside or by Ctrl-C, the runs are stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = ArgumentParser(description=Study.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of a study.")
    parser.add_argument("--report", action="store_true", help="Report what lies finished, only.")
    parser.add_class_arguments(Study, as_group=False)
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parser.parse_args(argv or [f"--config={DEMO}"])
        files, report = config.pop("config"), config.pop("report")
        here = Path(files[-1].absolute).parent if files else Path()
        compare(Study(**config.as_dict()), here, report=report)
    except (ArgumentError, ConfigError) as error:
        sys.exit(f"compare: {refusal(error)}")
    except KeyboardInterrupt:
        sys.exit("compare: stopped; the same command goes on with the unfinished runs")


if __name__ == "__main__":
    main()
