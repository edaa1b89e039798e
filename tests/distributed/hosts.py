"""Two hosts for tests: network namespaces with an address and a loopback of their own, joined by a cable."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator

#: Where each host is; the same in every test, since nobody else sees these networks.
ADDRESSES = ("10.0.0.1", "10.0.0.2")
INTERFACE = "cable0"

_count = itertools.count()


@contextlib.contextmanager
def hosts() -> Iterator[list[str]]:
    """Their names, for :func:`enter`; they are gone afterwards.

    Raises:
        NotImplementedError: this machine has no such thing, or does not let us.
    """
    if shutil.which("ip") is None:
        raise NotImplementedError("needs iproute2's command ip")
    number = next(_count)
    names = [f"layerpipe-{os.getpid()}-{number}-{i}" for i in range(len(ADDRESSES))]
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                raise NotImplementedError(f"network namespaces are not permitted: {error.stderr.strip()}") from error
            stack.callback(_ip, "netns", "delete", name)
        ends = [(INTERFACE, "netns", name) for name in names]
        try:
            _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        except subprocess.CalledProcessError as error:
            raise NotImplementedError(f"no cable between namespaces: {error.stderr.strip()}") from error
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
        yield names


def enter(name: str) -> None:
    """Go to a host, with this thread and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")


def cable(state: str) -> None:
    """``"down"`` takes this host off the network: nobody is told, messages just stop."""
    _ip("link", "set", INTERFACE, state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
