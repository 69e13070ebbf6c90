"""``python -m vlmrb_torchrl.judge``: arguments in, report out, refusals in one line."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from torchrl.envs import EnvBase

from vlmrb_torchrl.checks import ConfigError, one_line, require

INSTALL = "pip install 'vlmrb-torchrl[judge]'"
try:
    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

    from vlmrb_torchrl.judge.collection import read_meta
    from vlmrb_torchrl.judge.settings import Settings
except ImportError as missing:
    sys.exit(f"judge: {one_line(missing)}: {INSTALL}")

SUMMARY = (
    "Is this VLM any good here? Plays episodes of an environment, has one or more judges score "
    "clips of them, holds the scores against the simulator's events, and writes a report: "
    "precision, recall, AUC, calibration, cost, and a gallery of clips to look at "
    "(report.html). Without arguments: the embedded judge on DoorKey 8x8. Example: "
    "--env DoorKeyEnv --env.size 6 --scorers '[EmbeddedJudge]' --prompts '[goal, door, key]'. "
    "--env.help DoorKeyEnv and --scorers.help HuggingFaceScorer show the arguments of a class; a "
    "class of your own is named by its import path."
)
DEFAULTS = {
    "env": {"class_path": "vlmrb_torchrl.envs.DoorKeyEnv"},
    "scorers": [{"class_path": "vlmrb_torchrl.scorers.EmbeddedJudge"}],
}
OF_THE_CLIPS = ("clips", "clip_transitions", "frames_per_clip", "stride", "random_share")
REMEDIES = {
    "policy": "use mixed, scripted, random, a class path, or the policy.ckpt of a recipe's run",
    "scorers": "write a list, as --scorers '[EmbeddedJudge]'",
    "env": "name a class as vlmrb_torchrl.envs.DoorKeyEnv; --env.help CLASS shows its arguments",
}
NOISE_OF_HELP = re.compile(
    r"required, |, known subclasses: (torchrl|tensordict).*?(?=\)$)", flags=re.DOTALL
)
NOISE_OF_REFUSALS = re.compile(
    r'^Parser key "[\w.]+":|- Expected a path but .*? either not accessible or invalid '
    r"|Does not validate.*?Errors: |Given value type: .*?(?=Given value:)"
)

# It takes what __init__ takes, which its signature hides; jsonargparse follows this mark.
EnvBase.__new__.__func__.__wrapped__ = object.__new__


class _Formatter(DefaultHelpFormatter):
    """Without the names of TorchRL's seventy environments and as many modules."""

    def _expand_help(self, action: Any) -> str:
        return NOISE_OF_HELP.sub("", super()._expand_help(action))


def parse(argv: list[str]) -> tuple[Settings, dict[str, Any]]:
    """Read the command line; return the settings and, as plain data, what they were made from.

    Raises:
        ConfigError: Something in it cannot work.
    """
    parser = ArgumentParser(
        prog="python -m vlmrb_torchrl.judge",
        description=SUMMARY,
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of arguments.")
    parser.add_class_arguments(Settings, sub_configs=True)  # --policy may be a file, policy.yaml
    parser.set_defaults(DEFAULTS)
    try:
        argv = _with_policy_of_a_run(argv)
        config = parser.parse_args(argv)
        saved: dict[str, Any] = {}
        if config.load is not None:
            saved = read_meta(config.load)["arguments"]
            config = _as_saved(parser, config, saved, argv)
        built = parser.instantiate(config).as_dict()
        arguments = json.loads(parser.dump(config, format="json", skip_unset=False))
        for made in (built, arguments):
            made.pop("config", None)
        if saved:
            arguments["policy"] = saved["policy"]
        return Settings(**built), arguments
    except ArgumentError as error:
        text = one_line(error)
        named = re.match(r'Parser key "(\w+)[\w.]*":', text)
        text = " ".join(NOISE_OF_REFUSALS.sub("", text).split())
        if named:
            text = f"{named[1]}: {text}"
        remedy = REMEDIES.get(named[1]) if named else "--help lists the arguments"
        raise ConfigError(f"{text}; {remedy}" if remedy else text) from error
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ConfigError(one_line(error)) from error


def _with_policy_of_a_run(argv: list[str]) -> list[str]:
    """A recipe's checkpoint stands for the file beside it, which says which class plays it."""
    words = list(argv)
    for k, word in enumerate(words):
        option, _, path = word.rpartition("=")
        if path.endswith(".ckpt") and (option or words[k - 1]) == "--policy":
            file = Path(path).with_name("policy.yaml")
            remedy = f"no {file} says which class plays it; name the class, as --help tells"
            require(file.is_file(), "policy", path, remedy)
            words[k] = word.removesuffix(path) + str(file)
    return words


def _as_saved(
    parser: ArgumentParser, config: Namespace, saved: dict[str, Any], argv: list[str]
) -> Namespace:
    """Parse again, with what cannot be changed about clips that exist."""
    # The folder may come from anyone: the class to import is the user's word, not the folder's.
    named, of = config.env.class_path, saved["env"]["class_path"]
    require(named == of, "env", named, f"the clips in {config.load} are of --env {of}")
    parser.set_defaults({name: saved[name] for name in ("env", *OF_THE_CLIPS)})
    config = parser.parse_args(argv)
    for name in OF_THE_CLIPS:
        remedy = f"the clips in {config.load} were made with {saved[name]}: leave it out"
        require(config[name] == saved[name], name, config[name], remedy)
    return config


def run(settings: Settings, arguments: dict[str, Any], command: str) -> None:
    """Examine the judges; print the tables and where the report lies."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vlmrb_torchrl.judge.judging import examine
    from vlmrb_torchrl.judge.report import keep, show, write

    logging.getLogger("torchrl").setLevel(logging.WARNING)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        result = examine(settings, progress)
        if settings.save is not None:
            keep(result, settings.save, arguments)
        report = write(result, arguments, command)
    show(result, console)
    console.print(f"report: {report}", soft_wrap=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command line, by default with the process's own arguments."""
    given = sys.argv[1:] if argv is None else argv
    try:
        settings, arguments = parse(given)
        run(settings, arguments, shlex.join(["python", "-m", "vlmrb_torchrl.judge", *given]))
    except ImportError as error:
        sys.exit(f"judge: {one_line(error)}: {INSTALL}")
    except ConfigError as error:
        sys.exit(f"judge: {error}")
    except KeyboardInterrupt:
        sys.exit("judge: stopped; no report was written")


if __name__ == "__main__":
    main()
