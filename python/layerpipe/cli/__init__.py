"""``layerpipe train``, ``compare``, ``study`` and ``plan``."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from signal import SIGINT
from typing import Any, NoReturn


def main(arguments: list[str] | None = None) -> None:
    """The command line. A mistake in its use ends with one line on stderr and status 2, what the system refuses (a disk
    that is full) with one and status 1, Ctrl-C with 130, SIGTERM with 143."""
    from layerpipe.cli.signals import exit_status, number_of, terminable

    codecs.register_error(_PLAIN, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_PLAIN)
    try:
        with terminable() as signals:
            status = _run(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
            if signals and status == exit_status(SIGINT):  # what typer makes of every KeyboardInterrupt
                status = exit_status(signals[0])
    except KeyboardInterrupt as interrupt:
        sys.exit(exit_status(number_of(interrupt)))
    except BrokenPipeError:
        _forget_output()
        sys.exit(141)  # as of a process that SIGPIPE has ended
    except OSError as error:
        _forget_output()
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", status=1)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    try:
        from layerpipe.cli.app import app
    except ImportError as error:
        _fail(
            f"{error}; the command line needs more than the library: pip install '.[cli]' where layerpipe's sources are"
        )
    from layerpipe.errors import CheckpointError, DataError, StageError, UsageError

    try:
        status = app(args=arguments, standalone_mode=False, prog_name="layerpipe", obj=arguments)
    except (CheckpointError, DataError, UsageError) as error:
        _fail(str(error))
    except StageError as error:
        if error.__cause__ is not None:  # raised in this process, which is a bug, and keeps its traceback
            raise
        _fail(str(error), status=1)
    except Exception as error:
        # Typer's own errors know how to be said in a sentence; anything else is a bug and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} (layerpipe --help)")
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int = 2) -> NoReturn:
    with contextlib.suppress(OSError):  # of a disk that is full, too
        print("layerpipe: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def _forget_output() -> None:
    """Drop what is left in the buffer: Python would write it, and be refused, once more when it ends."""
    if (stream := sys.__stdout__) is not None and sys.stdout is stream:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_PLAIN = "layerpipe.plain"
_LIKE = str.maketrans({"–": "-", "−": "-", "±": "+-", "×": "x", "…": "...", "Ŵ": "W", "²": "^2", "°": "deg"})


def _plain(error: Any) -> tuple[str, int]:
    """Something like it for a character that the terminal's encoding lacks, or a question mark."""
    text = error.object[error.start : error.end].translate(_LIKE)
    return text.encode("ascii", "replace").decode(), error.end
