"""The command line of every recipe: typed signatures in, one-line refusals out."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
from contextlib import ExitStack, closing
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment

from recipes import arguments
from recipes.demonstrations import Demonstrations
from recipes.off_policy import train
from recipes.replay import Replay
from recipes.running.checkpoint import (
    Checkpoints,
    check_resumable,
    check_vacant,
    last_good,
    locked,
)
from recipes.running.divergence import DivergedError
from recipes.running.interruption import StoppedError
from recipes.running.metrics import Telemetry
from recipes.settings import Scoring, Training
from recipes.tasks import Task
from vlmrb_torchrl import keys
from vlmrb_torchrl.checks import ConfigError, one_line, require
from vlmrb_torchrl.scorers import ClipScorer

DEFAULT_SCORER = "vlmrb_torchrl.scorers.EmbeddedJudge"
GUIDE = (
    "A run is set up by YAML files, laid over each other in order, and by arguments, which come "
    "last: 'python -m {module} --config {configs}/TASK/{recipe}.yaml "
    "--config {configs}/methods/per.yaml --training.seed 1'; TASK may be {tasks}. "
    "Environment, replay method and judge are chosen by class: '--replay Uniform', "
    "'--env my_module.MyTask', '--scoring.scorer my_module.MyScorer'; '--replay.help VLMGuided' "
    "shows the settings of one. A run that was stopped goes on where it was: 'python -m "
    "{module} --resume runs/NAME'."
)
CONFIGS = Path(__file__).parents[1] / "configs"
LAUNCHED_BY_FABRIC_CLI = "LT_CLI_USED"
REFUSALS = (ArgumentError, ValueError, TypeError, OSError, RuntimeError, ImportError)

Algorithm = type[L.LightningModule]


def run(algorithm: Algorithm, argv: list[str] | None = None) -> None:
    """Parse the command line, build the parts, train.

    Args:
        algorithm: LightningModule class of the recipe.
        argv: Command line; by default the process's own.
    """
    if os.environ.get(LAUNCHED_BY_FABRIC_CLI):
        # A script's own folder comes first; with `python -m` it is where one's own modules lie.
        sys.path[0] = os.getcwd()
    parser = build_parser(algorithm)
    try:
        folder, argv = resumed(argv)
        config = parser.parse_args(argv)
        saved: dict[str, Any] = json.loads(parser.dump(config, format="json"))
        saved.pop("config", None)  # the files that it was read from
        if folder is not None:
            check_resumable(folder, saved)
        # Built once to refuse its arguments before any process or file exists.
        settings, module = build(algorithm, parser, config)
    except REFUSALS as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {refusal(error)}")
    launch(algorithm, module, settings, saved, resume=folder is not None)


def rehearse(algorithm: Algorithm, argv: list[str]) -> Namespace:
    """Build all that ``run`` builds before it trains, and return the settings.

    Raises:
        ConfigError: In one line, what ``run`` would refuse.
    """
    parser = build_parser(algorithm)
    try:
        settings, _ = build(algorithm, parser, parser.parse_args(argv))
    except REFUSALS as error:
        raise ConfigError(refusal(error)) from error
    return settings


def build_parser(algorithm: Algorithm) -> ArgumentParser:
    """Build the parser of a recipe from the signatures of its parts."""
    summary = (algorithm.__doc__ or algorithm.__name__).splitlines()[0]
    recipe = algorithm.__name__.lower()
    tasks = " or ".join(path.parent.name for path in tuned(recipe))
    guide = GUIDE.format(
        recipe=recipe,
        module=module_of(algorithm),
        configs=shown_path(CONFIGS),
        tasks=tasks or "a folder of your own",
    )
    parser = ArgumentParser(description=f"{summary} {guide}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; may be given repeatedly.")
    parser.add_argument(  # read before all others, by `resumed`: here to be listed
        "--resume",
        default=SUPPRESS,
        metavar="FOLDER",
        help="Folder of a run that was stopped, to go on with, under its settings.",
    )
    parser.add_subclass_arguments(Task, "env", required=False)
    parser.add_subclass_arguments(Replay, "replay", required=False)
    parser.add_class_arguments(Scoring, "scoring")
    defaults = {"replay": "recipes.replay.VLMGuided", "scoring.scorer": DEFAULT_SCORER}
    if "doorkey_6x6" in tasks:  # other recipes' defaults suit no task: it has to be named
        defaults["env"] = "recipes.tasks.DoorKey"
    parser.set_defaults({name: {"class_path": path} for name, path in defaults.items()})
    parser.add_class_arguments(Demonstrations, "demonstrations")
    parser.add_class_arguments(algorithm, "algorithm", skip={"env"}, instantiate=False)
    parser.add_class_arguments(Training, "training")
    return parser


def resumed(argv: list[str] | None) -> tuple[Path | None, list[str]]:
    """Turn ``--resume FOLDER``, if it is there, into the arguments of the run that lies there."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--resume", type=Path)
    named, others = ahead.parse_known_args(argv)
    folder: Path | None = named.resume
    if folder is None:
        return None, others
    config = folder / "config.yaml"
    require(config.is_file(), "--resume", folder, "name a run's folder, which holds config.yaml")
    place = [f"--training.log_dir={folder.parent}", f"--training.name={folder.name}"]
    return folder, [f"--config={config}", *others, *place]


def build(algorithm: Algorithm, parser: ArgumentParser, config: Namespace) -> tuple[Namespace, Any]:
    """Build the settings and the LightningModule, and refuse what cannot work together."""
    require("resume" not in config, "resume", config.get("resume"), "say it in the command itself")
    if config.get("env") is None:
        known = " or ".join(map(shown_path, tuned(algorithm.__name__.lower())))
        remedy = f"name a task's settings by --config {known}" if known else "name a task"
        raise ConfigError(f"env is not set: {remedy}, or one of your own by --env my_module.MyTask")
    settings = parser.instantiate(config)
    check(settings)
    return settings, build_algorithm(algorithm, settings)


def build_algorithm(algorithm: Algorithm, settings: Namespace) -> Any:
    """Build the LightningModule for the specs of the environment."""
    torch.manual_seed(settings.training.seed)
    with closing(settings.env.make(1, seed=0)) as env:
        require(
            env.batch_size == (1,),
            f"the batch size of {type(settings.env).__name__}.make(1)",
            list(env.batch_size),
            "return a batch of num_envs environments, [1], such as torchrl's SerialEnv",
        )
        return algorithm(env, **settings.algorithm.as_dict())


# -------------------------------------------------------------- settings that cannot work together


def check(settings: Namespace) -> None:
    """Refuse settings that are each in order and cannot work together."""
    replay, training = settings.replay, settings.training
    pairs = [("training.eval_every_env_steps", "training.total_env_steps")]
    if "n_steps" in settings.algorithm:  # a transition spans steps of one collection
        pairs.append(("algorithm.n_steps", "training.steps_per_collection"))
    if replay.uses_scores:
        pairs.append(("scoring.clip_transitions", "replay.capacity"))
    for name, limit in pairs:
        value, most = attrgetter(name, limit)(settings)
        require(value <= most, name, value, f"use at most {limit} ({most})")
    steps = training.env_steps_per_collection
    name = "training.num_envs x training.steps_per_collection"
    remedy = f"use at most replay.capacity ({replay.capacity})"
    require(steps <= replay.capacity, name, steps, remedy)
    warmup, total = training.warmup_env_steps, training.total_env_steps
    remedy = f"use less than training.total_env_steps ({total})"
    require(warmup < total, "training.warmup_env_steps", warmup, remedy)
    for name in ("training.accelerator", "replay.device"):
        here = torch.cuda.is_available() or attrgetter(name)(settings) != "cuda"
        require(here, name, "cuda", "no GPU is here: use cpu")
    if replay.uses_scores:
        check_judge(settings.env, settings.scoring.scorer)


def check_judge(task: Task, scorer: ClipScorer) -> None:
    """Refuse a judge that the task's clips cannot be shown to.

    Faults of a judge stop no run, so what it can never read is found out before.
    """
    judge = scorer
    while isinstance(inner := getattr(judge, "scorer", None), ClipScorer):
        judge = inner  # beneath its cache or its noise
    reads, reports = getattr(judge, "event_names", None), tuple(task.event_names)
    require(
        reads is None or tuple(reads) == reports,
        f"{type(judge).__name__}'s event_names",
        reads,
        f"{type(task).__name__} reports {reports or 'no events'}",
    )
    if scorer.needs_frames:
        check_view(task, scorer)


def check_view(task: Task, scorer: ClipScorer) -> None:
    """Refuse a camera that is missing, cannot draw here, or that the judge does not know."""
    name, renderer = type(task).__name__, task.renderer()
    if renderer is None:
        raise ConfigError(
            f"env is {name}: it has no renderer for a judge's frames, write one or "
            "use --replay Uniform or Prioritized"
        )
    with closing(task.make(1, seed=0)) as env:
        first = env.reset()
        require(
            keys.RENDER_STATE in first.keys(),  # noqa: SIM118
            f"what {name}'s environment writes",
            sorted(map(str, first.keys())),
            f'write "{keys.RENDER_STATE}", which its renderer() draws from',
        )
        height, width = renderer(first[keys.RENDER_STATE]).shape[-2:]
    require(
        scorer.frame_size in (None, (height, width)),
        "the view of env, in pixels,",
        (height, width),
        f"{type(scorer).__name__} knows {scorer.frame_size} only: use another scoring.scorer, or "
        f"another view ('--env.help {name}' shows its settings)",
    )


# -------------------------------------------------------------- what is said to the user


def tuned(recipe: str) -> list[Path]:
    """The files with settings of a recipe, one for each task that it was tuned on."""
    return sorted(CONFIGS.glob(f"*/{recipe}.yaml"))


def module_of(algorithm: Algorithm) -> str:
    """Name the module of an algorithm, which is ``__main__`` to itself when it is run."""
    if algorithm.__module__ != "__main__":
        return algorithm.__module__
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return main.__spec__.name
    script = Path(str(main.__file__)).resolve()
    return f"recipes.{script.stem}" if script.parent == CONFIGS.parent else script.stem


def advice(algorithm: Algorithm, settings: Namespace) -> str:
    """Say which settings suit the task, where there are any and no file says how to train."""
    recipe, task = algorithm.__name__.lower(), settings.env
    file = CONFIGS / task.configs / f"{recipe}.yaml"
    known = file.is_file() and says_how_to_train(file)
    if not known or any(map(says_how_to_train, settings.get("config") or [])):
        return ""
    name = task.name or type(task).__name__
    return f"{name} is hardly learnt with the default settings: use --config {shown_path(file)}"


def says_how_to_train(file: Any) -> bool:
    """Whether a YAML file has a section ``training``; None, a text in its place, counts as one."""
    return file is None or "training" in (yaml.safe_load(Path(str(file)).read_text()) or {})


def shown_path(path: Path) -> str:
    """A path as one would write it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def refusal(error: Exception) -> str:
    """Say in one line what was refused, with the remedy."""
    text = arguments.refusal(error)
    if "dot import path" in text:  # jsonargparse's words for a class that it does not know
        text += "; --help lists the classes known, my_module.MyClass would be one of your own"
    return text


# -------------------------------------------------------------- the run


def launch(
    algorithm: Algorithm, module: Any, settings: Namespace, saved: dict[str, Any], *, resume: bool
) -> None:
    """Launch Fabric, unless ``fabric run`` did, and train; ``saved`` are the settings as JSON."""
    training: Training = settings.training
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(training.torch_threads)
    if os.environ.get(LAUNCHED_BY_FABRIC_CLI):
        fabric = Fabric()
    else:
        # One device, also in an allocation of SLURM's or MPI's, whose tasks are not ranks of ours.
        alone = LightningEnvironment()
        alone.set_global_rank(0)
        fabric = Fabric(accelerator=training.accelerator, devices=1, plugins=alone)
        fabric.launch()
    # Lightning asks torch to look for NVML whenever it asks for a GPU, which Adam does in each
    # step: 0.1 ms where there is none. The processes are forked by now; the plain check is free.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    fabric.seed_everything(training.seed * fabric.world_size + fabric.global_rank, verbose=False)
    task = settings.env.name or type(settings.env).__name__.lower()
    method = type(settings.replay).__name__.lower()
    name = f"{algorithm.__name__.lower()}_{task}_{method}_s{training.seed}"
    folder = Path(training.log_dir) / (training.name or name)
    again = f"python -m {module_of(algorithm)} --resume {folder}"
    try:
        with ExitStack() as kept:
            if fabric.is_global_zero:
                kept.enter_context(locked(folder))
                if not resume:
                    check_vacant(folder)
                describe(folder, algorithm, saved)
                if advised := advice(algorithm, settings):
                    print(advised, file=sys.stderr, flush=True)
            fabric.barrier()  # no rank touches the folder before it is this run's
            every = training.checkpoint_every_env_steps
            checkpoints = Checkpoints(fabric, folder, every, saved, resume=resume)
            telemetry = Telemetry(fabric, settings.env, training, folder, resumed=resume)
            train(fabric, module, settings, kept.enter_context(telemetry), checkpoints)
    except DivergedError as error:
        sys.exit(f"{error}; {last_good(folder, f'{again} --algorithm.learning_rate …')}")
    except ConfigError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"{one_line(error)}: free some of {folder}'s disk; {last_good(folder, again)}")
    except StoppedError as stop:
        rest = f"go on: {again}" if stop.saved else "not saved"
        end(fabric, f"stopped by {stop}; {rest}", stop.signal)
    except KeyboardInterrupt:
        end(fabric, f"stopped at once; figures so far: {folder}", signal.SIGINT)
    if fabric.is_global_zero and training.progress:
        print(f"logs: {folder} (tensorboard --logdir {training.log_dir})")


def describe(folder: Path, algorithm: Algorithm, saved: dict[str, Any]) -> None:
    """Write the whole configuration, and which class plays ``policy.ckpt``."""
    written = folder / "config.yaml.writing"  # whole or not at all: --resume reads it
    written.write_text(yaml.safe_dump(saved, sort_keys=False))
    written.replace(folder / "config.yaml")
    policy = {
        "class_path": "recipes.running.policies.TrainedPolicy",
        "init_args": {
            "checkpoint": "policy.ckpt",
            "algorithm": f"{module_of(algorithm)}.{algorithm.__name__}",
        },
    }
    (folder / "policy.yaml").write_text(json.dumps(policy))


def end(fabric: Fabric, text: str, number: int) -> NoReturn:
    """End the process as a shell expects of one that a signal has ended."""
    if fabric.is_global_zero:
        print(text, file=sys.stderr, flush=True)
    sys.exit(128 + number)
