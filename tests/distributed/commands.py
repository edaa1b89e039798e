"""The command line in several processes."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from layerpipe.cli import main


def command(
    rank: int, size: int, master: tuple[str, int], directory: str, arguments: list[str], agent: bool = False
) -> tuple[Any, str, str]:
    """``layerpipe`` as torchrun runs it, in a directory of this rank's own; its status, and what it printed.

    Args:
        master: address and port of the store, which the first rank opens.
        agent: the store is open already, as torchrun's own is.
    """
    dist.destroy_process_group()  # it makes one of its own
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank * agent), WORLD_SIZE=str(size), MASTER_ADDR=master[0],
        MASTER_PORT=str(master[1]), TORCHELASTIC_USE_AGENT_STORE=str(agent), TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    before, here = Path.cwd(), Path(directory, str(rank))
    here.mkdir(exist_ok=True)
    os.chdir(here)
    printed, said, status = io.StringIO(), io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
        if dist.is_initialized():
            dist.destroy_process_group()
    return status, said.getvalue(), printed.getvalue()


def one_command_each(
    rank: int, size: int, master: tuple[str, int], directory: str, commands: list[list[str]]
) -> tuple[Any, str, str]:
    """As :func:`command`, with arguments of each process's own."""
    return command(rank, size, master, directory, commands[rank], True)
