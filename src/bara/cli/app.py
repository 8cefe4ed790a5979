"""The command `bara`. What is slow to import is imported by the commands when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from bara.cli.bayesianize import bayesianize
from bara.cli.bench import bench
from bara.cli.certify import certify
from bara.cli.doctor import doctor
from bara.cli.evaluate import evaluate
from bara.cli.export import export
from bara.cli.generate import generate
from bara.cli.predict import predict
from bara.cli.prune import prune
from bara.cli.quickstart import quickstart
from bara.cli.ranks import ranks
from bara.cli.review import review
from bara.cli.select import select
from bara.cli.serve import serve
from bara.cli.terminal import use_utf8
from bara.cli.train import train
from bara.cli.tune import tune
from bara.errors import BaraError

LONGEST_LINE = 2000
"""Characters of an error's line; file names and values in it may be longer than a screen."""

app = typer.Typer(
    name="bara",
    help="Bayesian low-rank adaptation with adaptive rank.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(quickstart)
app.command()(doctor)
app.command()(train)
app.command()(tune)
app.command()(bayesianize)
app.command()(evaluate)
app.command()(predict)
app.command()(select)
app.command()(review)
app.command()(bench)
app.command()(certify)
app.command()(ranks)
app.command()(prune)
app.command()(export)
app.command()(generate)
app.command()(serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; whatever goes wrong becomes one line on standard error.

    Args:
        arguments: the command line without the program's name; `sys.argv`'s by default.

    Returns:
        The exit code: 0, 1 for an error, 2 for a wrong command line, 130 when interrupted.
        With BARA_DEBUG=1 in the environment, errors raise instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    use_utf8()
    try:
        # Not `app(...)`: typer would print errors its own way, over many lines.
        command = typer.main.get_command(app)
        with command.make_context("bara", arguments or ["--help"], obj=arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as exit_request:
        return exit_request.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail("the reader of the output closed the pipe", 1)
    except Exception as error:
        if os.environ.get("BARA_DEBUG"):
            raise
        if isinstance(error, BaraError):
            return _fail(str(error), 1)
        if hasattr(error, "format_message"):  # typer's usage errors
            return _fail(f"{error.format_message()} (see --help)", error.exit_code)  # type: ignore[attr-defined]
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return _fail("out of memory; give a smaller model, rank, batch or table", 1)
        if isinstance(error, OSError):
            named = f"{error.filename}: " if error.filename else ""
            return _fail(f"{named}{error.strerror or error}", 1)
        return _fail(
            f"unexpected {type(error).__name__}: {error} (BARA_DEBUG=1 shows where; please report)",
            1,
        )


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    print("bara: error:", line.encode(errors="replace").decode(), file=sys.stderr)
    return code
