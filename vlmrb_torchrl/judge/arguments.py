"""The command line of the judge: typed signatures in, settings or a one-line refusal out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    lazy_instance,
)
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from vlmrb_torchrl.checks import ConfigError, one_line, require
from vlmrb_torchrl.envs.doorkey import DoorKeyEnv
from vlmrb_torchrl.judge.dataset import read_meta
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.scorers import ClipScorer

NAMES = ("mixed", "scripted", "random")
EXAMPLE = "--env DoorKeyEnv --env.size 6 --scorers '[EmbeddedJudge]' --prompts '[goal, door, key]'"
SUMMARY = (
    "Is this VLM any good here? Plays episodes of an environment, has one or more judges score "
    "clips of them, holds the scores against the simulator's events, and writes a report: "
    "precision, recall, AUC, calibration, cost, and a gallery of clips to look at "
    f"(report.html). Without arguments: the embedded judge on DoorKey 8x8. Example: {EXAMPLE}. "
    "--env.help DoorKeyEnv and --scorers.help HuggingFaceScorer show the arguments of a class; a "
    "class of your own is named by its import path."
)
OF_THE_CLIPS = ("clips", "clip_transitions", "frames_per_clip", "stride", "random_share")
REMEDIES = {
    "policy": "use mixed, scripted, random, a class path, or the policy.ckpt of a recipe's run",
    "scorers": "write a list, as --scorers '[EmbeddedJudge]'",
    "env": "name a class as vlmrb_torchrl.envs.DoorKeyEnv; --env.help CLASS shows its arguments",
}


# It takes what __init__ takes, which its signature hides; jsonargparse follows this mark.
EnvBase.__new__.__func__.__wrapped__ = object.__new__


class _Formatter(DefaultHelpFormatter):
    """Without the names of TorchRL's seventy environments and as many modules."""

    def _expand_help(self, action: Any) -> str:
        text: str = super()._expand_help(action)
        return re.sub(
            r", known subclasses: (torchrl|tensordict).*?(?=\)$)", "", text, flags=re.DOTALL
        )


def build_parser(policy: str) -> ArgumentParser:
    """Build the parser from the signatures of what it makes.

    Args:
        policy: What was said after ``--policy``: one of ``NAMES``, or it is read as a class.
    """
    parser = ArgumentParser(
        prog="python -m vlmrb_torchrl.judge",
        description=SUMMARY,
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of arguments.")
    parser.add_subclass_arguments(
        EnvBase,
        "env",
        default=lazy_instance(DoorKeyEnv),
        required=False,
        help="The environment's class: any of TorchRL with a render state, events, prompts and a "
        "renderer (vlmrb_torchrl.envs.JudgedEnv). Its arguments: --env.size 8.",
    )
    parser.add_argument(
        "--scorers",
        type=list[ClipScorer],
        default=[{"class_path": "vlmrb_torchrl.scorers.EmbeddedJudge"}],
        help="The judges, a list: '[EmbeddedJudge, {class_path: HuggingFaceScorer, init_args: "
        "{model: facebook/Perception-LM-1B}}]'.",
    )
    skip = {"env", "scorers"}
    if policy not in NAMES:
        parser.add_subclass_arguments(TensorDictModuleBase, "policy", required=True)
        skip.add("policy")
    parser.add_class_arguments(Settings, skip=skip)
    return parser


def parse(argv: list[str]) -> tuple[Settings, dict[str, Any]]:
    """Read the command line; return the settings and, as plain data, what they were made from.

    Raises:
        ConfigError: Something in it cannot work.
    """
    argv, policy = _policy(argv)
    try:
        parser = build_parser(policy)
        config = parser.parse_args(argv)
        saved: dict[str, Any] = {}
        if config.load is not None:
            saved = _saved_arguments(config)
            config = _as_saved(parser, saved, argv)
        built = parser.instantiate(config).as_dict()
        arguments = json.loads(parser.dump(config, format="json", skip_unset=False))
        built.pop("config", None)
        arguments.pop("config", None)
        if saved:
            arguments["policy"] = saved["policy"]
        return Settings(**built), arguments
    except ArgumentError as error:
        text = one_line(error)
        key = re.match(r'Parser key "(\w+)', text)
        remedy = REMEDIES.get(key[1], "") if key else "--help lists the arguments"
        text = re.sub(r'^Parser key "([\w.]+)":', r"\1:", text)
        text = re.sub(
            r"Does not validate.*Errors: (.*) Given value type: .* Given", r"\1; given", text
        )
        raise ConfigError(f"{text}; {remedy}" if remedy else text) from error
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ConfigError(one_line(error)) from error


def _policy(argv: list[str]) -> tuple[list[str], str]:
    """Find what follows ``--policy``; a recipe's checkpoint stands for the file beside it."""
    said, policy, words = NAMES[0], [], iter(argv)
    rest = []
    for word in words:
        if word != "--policy" and not word.startswith("--policy="):
            rest.append(word)
            continue
        given = said = next(words, "") if word == "--policy" else word.partition("=")[2]
        if given.endswith(".ckpt"):
            said = str(Path(given).with_name("policy.yaml"))
            remedy = f"no {said} says which class plays it; name the class, as --help tells"
            require(Path(said).is_file(), "policy", given, remedy)
        require("." in said or said in NAMES, "policy", repr(given), REMEDIES["policy"])
        policy = [f"--policy={said}"]
    return policy + rest, said


def _saved_arguments(config: Namespace) -> dict[str, Any]:
    """What the clips of ``--load`` were made with."""
    saved: dict[str, Any] = read_meta(Path(config.load))["arguments"]
    # The folder may come from anyone: the class to import is the user's word, not the folder's.
    require(
        config.env.class_path == saved["env"]["class_path"],
        "env",
        config.env.class_path,
        f"the clips in {config.load} are of --env {saved['env']['class_path']}",
    )
    return saved


def _as_saved(parser: ArgumentParser, saved: dict[str, Any], argv: list[str]) -> Namespace:
    """Parse again, with what cannot be changed about clips that exist."""
    parser.set_defaults({"env": saved["env"], **{name: saved[name] for name in OF_THE_CLIPS}})
    config = parser.parse_args(argv)
    for name in OF_THE_CLIPS:
        remedy = f"the clips in {config.load} were made with {saved[name]}: leave it out"
        require(config[name] == saved[name], name, config[name], remedy)
    return config
