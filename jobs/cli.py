"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from ..tokenizers.spec import RunFailed, UserError
from . import commands_corpus, commands_look, commands_setup, commands_tokens
from .console import app, fail, say

# importing these puts their commands on `app`
COMMANDS = (commands_setup, commands_corpus, commands_tokens, commands_look)


def main() -> None:
    """Run the command line: exit status 0 done, 1 the run or the data failed, 2 a mistake, 130 interrupted."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except UserError as error:
        fail(error, status=2)
    except RunFailed as error:
        fail(error, status=1)
    except _Interrupted:
        say("Stopped. What was committed stays; the same command goes on from there.")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror or error}{where}. What was committed stays; run the command again.", status=1)


@app.callback()
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"wavemill {installed('wavemill')}")
        raise typer.Exit


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt, for which Typer has words of its own."""


def _interrupt(number: int, frame: object) -> NoReturn:
    raise _Interrupted


if __name__ == "__main__":
    main()
