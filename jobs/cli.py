"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer

from ..tokenizers.spec import RunFailed, UserError
from . import (
    commands_codebook,
    commands_corpus,
    commands_generate,
    commands_layouts,
    commands_look,
    commands_pins,
    commands_setup,
    commands_tokenizers,
    commands_tokens,
    commands_train,
    commands_units,
)
from .console import app, fail, say
from .interrupts import Interrupted, handle_interrupts

# importing these puts their commands on `app`
COMMANDS = (
    commands_setup,
    commands_corpus,
    commands_codebook,
    commands_tokenizers,
    commands_tokens,
    commands_train,
    commands_generate,
    commands_units,
    commands_layouts,
    commands_look,
    commands_pins,
)
BUG = 70  # exit status, as sysexits.h has it: EX_SOFTWARE
_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, wherever this version of Typer keeps it


@dataclass(slots=True)
class _Asked:
    """Options that stand before the command."""

    debug: bool = False


def main() -> None:
    """Run the command line.

    Exit status 0 done, 1 the run or the data failed, 2 a mistake, 70 a bug in wavemill, 130 interrupted, 143 preempted.
    """
    handle_interrupts()
    asked = _Asked()
    try:
        sys.exit(app(prog_name="wavemill", standalone_mode=False, obj=asked))
    except _UsageError as error:
        _fail_usage(error)
    except UserError as error:
        fail(error, status=2)
    except RunFailed as error:
        fail(error, status=1)
    except Interrupted as interrupted:
        say(interrupted.words)
        sys.exit(interrupted.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if asked.debug:
            say(traceback.format_exc().rstrip())
        fail(_failure(error), status=1)
    except Exception as error:  # noqa: BLE001 - the last place there is: what comes here is a bug
        if asked.debug:
            say(traceback.format_exc().rstrip())
            sys.exit(BUG)
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fail(f"This is a bug in wavemill: {told}. Run again with wavemill --debug and report it.", status=BUG)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"wavemill {version('wavemill')}")
        raise typer.Exit


@app.callback()
def _before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback if wavemill itself fails.")] = False,
) -> None:
    if isinstance(context.obj, _Asked):
        context.obj.debug = debug


def _fail_usage(error: Any) -> NoReturn:
    """Tell what is wrong with the command line, in one sentence and without boxes."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    told = error.format_message().strip()
    near = getattr(error, "possibilities", None)
    if near:  # click: "No such option: --wokers (Possible options: --workers)"
        told = f"{error.message.strip()}. Did you mean {', '.join(sorted(near))}?"
    told = told.replace(": Input should be", ": it should be")  # pydantic's words, in Typer from 0.26
    command = error.ctx.command_path if error.ctx is not None else "wavemill"
    fail(f"{told}{'' if told.endswith(('.', '?')) else '.'} See: {command} --help", status=error.exit_code)


def _failure(error: OSError) -> str:
    """What the system refused, in one sentence."""
    from ..storage.table import reason

    told = reason(error)
    where = f" ({error.filename})" if error.filename else ""
    advice = "free some space and " if "No space left" in told else ""
    return f"{told}{where}. What was committed stays; {advice}run the command again."


if __name__ == "__main__":
    main()
