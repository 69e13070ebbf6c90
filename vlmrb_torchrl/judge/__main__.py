"""``python -m vlmrb_torchrl.judge``: arguments in, report out, refusals in one line."""

from __future__ import annotations

import logging
import shlex
import sys
from typing import TYPE_CHECKING, Any

from vlmrb_torchrl.checks import ConfigError, one_line

if TYPE_CHECKING:
    from vlmrb_torchrl.judge.settings import Settings

INSTALL = "pip install 'vlmrb-torchrl[judge]'"


def run(settings: Settings, arguments: dict[str, Any], command: str) -> None:
    """Judge the judges; print the tables and where the report lies."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vlmrb_torchrl.judge.examination import examine, keep, show, write

    logging.getLogger("torchrl").setLevel(logging.WARNING)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        result = examine(settings, progress)
        if settings.save is not None:
            keep(result, arguments)
        report = write(result, arguments, command)
    show(result, console)
    console.print(f"report: {report}", soft_wrap=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; by default the process's own.
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        from vlmrb_torchrl.judge.arguments import parse

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
