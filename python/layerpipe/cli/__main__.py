"""``python -m layerpipe.cli``."""

import os
import sys

from layerpipe.cli import main


def run() -> None:
    """:func:`main`, in one of torchrun's processes with an end of its own."""
    try:
        main()
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        # A thread of gloo's may still be about to free a tensor, for which it needs Python; an interpreter that is
        # shutting down ends such a thread, and C++ then aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    run()
