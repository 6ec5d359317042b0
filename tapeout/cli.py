"""The command line: its verbs, and what becomes of their errors."""

from __future__ import annotations

import os
import signal
import sys

import cyclopts
from cyclopts import App

from tapeout import __version__, pages, targets
from tapeout.commands import deliver, look, make, prove
from tapeout.commands.matrix import matrix
from tapeout.commands.terminal import Stopped, any_encoding, say, see, stderr, stdout, stop, stopped
from tapeout.errors import MissingToolchain, OutputError, TapeoutError

app = App(
    name="tapeout",
    version=__version__,
    console=stdout,
    error_console=stderr,
    suppress_keyboard_interrupt=False,  # main says what became of the work
    help="Quantize a language model once, lower those exact codes to every device, and prove it.",
)
app.register_install_completion_command(help="Install completion for this shell.")
for verb in (
    make.export_app,
    make.quantize,
    make.budget,
    make.plan,
    matrix,
    prove.validate,
    prove.bench,
    prove.run,
    prove.diff,
    prove.compare,
    deliver.verify,
    deliver.sign,
    deliver.push,
    deliver.pull,
    deliver.delta,
    deliver.patch,
    look.inspect,
    look.env_app,
    look.doctor,
    look.docs,
):
    app.command(verb)
app.command(look.list_targets, name="targets")


def registered() -> App:
    """The command line with ``export`` of each installed target."""
    for name in targets.names():
        if name not in make.export_app:
            make.register_export(targets.get(name))
    return app


def main() -> None:
    """Run the command line; exit status 0 all gates pass, 1 a gate failed, 2 bad input or usage, 3 something is missing."""
    any_encoding()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        status = registered()(sys.argv[1:], exit_on_error=False, result_action="return_value")
    except TapeoutError as error:
        say(str(error), pages.explaining(error))
        status = error.status
    except cyclopts.CycloptsError:
        see(TapeoutError.page)  # cyclopts has printed what is wrong
        status = TapeoutError.status
    except (KeyboardInterrupt, Stopped):
        number = stopped[0] if stopped else signal.SIGINT
        say(
            f"stopped by {number.name}; nothing half-written was left. The same command goes on where it stopped."
        )
        status = 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        say(f"the operating system refused: {error}.", OutputError.page)
        status = OutputError.status
    except ModuleNotFoundError as error:
        say(
            f"the Python package '{error.name}' is not installed: pip install 'tapeout[cpu]' brings what a CPU export needs.",
            MissingToolchain.page,
        )
        status = MissingToolchain.status
    sys.exit(status or 0)
