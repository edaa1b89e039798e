"""``layerpipe train``, ``layerpipe compare`` and ``layerpipe plan``."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """The command line. A mistake in its use ends with one line on stderr and status 2, Ctrl-C with 130."""
    try:
        from layerpipe.cli.app import app
    except ImportError as error:
        _fail(
            f"{error}; the command line needs more than the library: pip install '.[cli]' where layerpipe's sources are"
        )
    from layerpipe.errors import CheckpointError, DataError, StageError, UsageError

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="layerpipe", obj=arguments)
    except (CheckpointError, DataError, UsageError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except StageError as error:
        if error.__cause__ is not None:  # raised in this process, which is a bug, and keeps its traceback
            raise
        _fail(str(error), status=1)
    except Exception as error:
        # Typer's own errors know how to be said in a sentence; anything else is a bug and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} (layerpipe --help)")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> None:
    print("layerpipe: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
