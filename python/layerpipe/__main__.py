"""``python -m layerpipe`` is the command line."""

from layerpipe.cli.__main__ import run

run()
