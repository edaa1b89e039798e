"""A device without hardware: ops on CPU tensors run at once and are reported to torch's race detector
(:mod:`torch.cuda._sanitizer`) as work of the stream that is current, and waits and events as on a GPU.

Time is counted in ops: each takes 1 ms of its stream, and issuing them takes none. A stream that waits for an event
goes on when the event's stream has come to it.

Three things are found: two streams that use the same memory in no order, memory given back while another stream may
still use it (the allocator hands it to the next tensor of the stream that made it), and a host that waits.

On a GPU a backward runs on the streams of its forward, and on the CPU on the one that is current: a stage's forward and
backward of a minibatch share a stream, so both are the same.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.cuda import _sanitizer
from torch.cuda._sanitizer import EventHandler, zip_arguments
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from layerpipe import accelerator
from layerpipe.executors import streams

Site = tuple[str, int]  # the function and line that asked for something

#: Written by batch norm, which its schemas do not say, and not looked at in the backward of training.
_RUNNING = ("running_mean", "running_var")


#: Looks at a tensor's shape only.
_FACTORY = re.compile(r"::(new_.*|.*_like)$")


def _unseen(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """What a fake device does with tensors is nothing that a stage's modes shall see: a real one does it in C++."""

    @functools.wraps(dispatch)
    def unseen(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # type: ignore[no-untyped-call]
            return dispatch(*args, **kwargs)

    return unseen


class FakeStream:
    def __init__(self, device: FakeDevice, number: int) -> None:
        self.device, self.number = device, number
        self.time = 0  # ms

    def wait_event(self, event: FakeEvent) -> None:
        if self.device.asked("wait"):
            self.device.handler._handle_event_wait(event.number, self.number)
            self.time = max(self.time, event.time)


class FakeEvent:
    """Says the time between two only where a device would: both timed, recorded, and waited for by the host."""

    def __init__(self, device: FakeDevice, number: int, *, timed: bool) -> None:
        self.device, self.number, self.timed = device, number, timed
        self.time = 0  # ms
        self.waits: int | None = None  # of the host, before it was recorded
        device.handler._handle_event_creation(number)

    def record(self, stream: FakeStream) -> None:
        if self.device.capturing:
            raise RuntimeError("an event that is recorded in a graph has no time")
        self.device.handler._handle_event_record(self.number, stream.number)
        self.time, self.waits = stream.time, self.device.waits
        self.device.timed_records += self.timed

    def elapsed_time(self, later: FakeEvent) -> float:
        if not all(event.timed and event.waits is not None for event in (self, later)):
            raise RuntimeError("both events must be recorded, and with timing, before calculating elapsed time")
        if any(event.waits == self.device.waits for event in (self, later)):
            raise RuntimeError("device not ready: the host has not waited for both events")
        return later.time - self.time


class FakeGraph(TorchDispatchMode):
    """Ops and the tensors that they were called with; a replay calls them again and copies what they return.

    What a capture has freed, the pool gives to the next ones: a replay overwrites all that graphs captured later into
    the same pool have made.

    Args:
        pool: the graphs that are in it already.
    """

    def __init__(self, device: FakeDevice, pool: list[FakeGraph]) -> None:
        super().__init__()
        self._device, self._pool = device, pool
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, Any] = {}  # storages
        self._before: dict[int, tuple[Any, Any]] = {}  # memory that a capture must not have changed, and a copy

    @_unseen
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The reference step looks at the device's clock; what it finds is the same from when the delay has filled up.
        if func is torch.ops.aten._local_scalar_dense.default and "/reference.py" not in _nearest("/layerpipe", 1)[0]:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip_arguments(func._schema, args, kwargs):
            if argument.name in _RUNNING or (argument.alias_info is not None and argument.alias_info.is_write):
                for tensor in pytree.tree_leaves(value):
                    memory = tensor.untyped_storage()
                    if memory._cdata not in self._made and memory._cdata not in self._before:
                        self._before[memory._cdata] = memory, memory.clone()
        result = func(*args, **kwargs)
        self._ops.append((func, args, kwargs, result))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = [t.untyped_storage() for t in _tensors(result)]
        self._made |= {memory._cdata: memory for memory in made if memory._cdata not in given}
        return result

    def undo(self) -> None:
        for memory, content in self._before.values():
            memory.copy_(content)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        self._device.replays += 1
        for graph in self._pool[self._pool.index(self) + 1 :]:
            for memory in graph._made.values():
                ctypes.memset(memory.data_ptr(), 0xFF, memory.nbytes())  # NaN or -1
        for func, args, kwargs, result in self._ops:
            if func is torch.ops.aten._local_scalar_dense.default:
                continue
            returns = func._schema.returns
            if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                continue  # a view is where it was
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old is not new:
                    old.data.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


class FakeDevice(TorchDispatchMode):
    """Stands in for :class:`layerpipe.accelerator.Accelerator`, and watches every op while it is entered.

    Args:
        without: what this place in the code asks for does not happen: a bug that must be found.
    """

    def __init__(self, without: Site | None = None) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.handler = EventHandler()
        self.sites: dict[Site, str] = {}
        self.errors: list[str] = []
        self.host_waits: list[Site] = []
        self._without = without
        self._numbers = iter(range(1, 1 << 30))
        self._current = [FakeStream(self, 0)]  # the caller's
        self._streams = list(self._current)
        self.waits = 0  # of the host, for everything
        self.timed_records = 0
        self._made: dict[int, int | None] = {}  # storage -> the stream that it was made on; None for a graph's own
        self.replays = 0
        self.captured: list[tuple[int, int]] = []  # (pool, stream)
        self._pools: dict[int, list[FakeGraph]] = {}  # in the order of their capture
        self.forgot: list[int] = []  # workspaces, after so many captures
        self.capturing = False
        self._kept: dict[int, set[int]] = {}  # storage -> streams that its memory waits for

    # -- what the engine calls

    def stream(self) -> FakeStream:
        stream = FakeStream(self, next(self._numbers))
        self.handler._handle_stream_creation(stream.number)
        self._streams.append(stream)
        return stream

    def event(self, *, timed: bool = False) -> FakeEvent:
        return FakeEvent(self, next(self._numbers), timed=timed)

    def wait(self) -> None:
        self.waits += 1
        self.host_waits.append(_site(1))
        self.handler._handle_device_synchronization()
        now = max(stream.time for stream in self._streams)
        for stream in self._streams:
            stream.time = now

    def current(self) -> FakeStream:
        return self._current[-1]

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def keep(self, tensor: Tensor, stream: FakeStream) -> None:
        if self.asked("keep"):
            self._kept.setdefault(self._storage(tensor), set()).add(stream.number)

    def drawn(self) -> bytes:
        return torch.get_rng_state().numpy().tobytes()

    def pool(self) -> int:
        return next(self._numbers)

    def gradient_edge(self, param: Tensor) -> GradientEdge:
        """Its node puts gradients down on the stream where it was made, as on a device.

        That stream waits for the one that computed them, and is waited for: a backward does so at its end.
        """
        edge, home = get_gradient_edge(param), self.current()

        def switch(before: FakeStream, after: FakeStream) -> None:
            event = next(self._numbers)
            self.handler._handle_event_creation(event)
            self.handler._handle_event_record(event, before.number)
            self.handler._handle_event_wait(event, after.number)

        def enter(*_: Any) -> None:
            switch(self.current(), home)
            self._current.append(home)

        def leave(*_: Any) -> None:
            switch(self._current.pop(), self.current())

        edge.node.register_prehook(enter)
        edge.node.register_hook(leave)
        return edge

    def forget_workspaces(self) -> None:
        self.forgot.append(len(self.captured))

    def capture(self, pool: int, stream: FakeStream, work: Any) -> FakeGraph:
        of_pool = self._pools.setdefault(pool, [])
        graph = FakeGraph(self, of_pool)
        of_pool.append(graph)
        self.capturing = True
        try:
            with self.use(stream), graph:
                work()
        finally:
            graph.undo()
            self.capturing = False
        self.captured.append((pool, stream.number))
        return graph

    # -- what is found

    def asked(self, what: str) -> bool:
        """Remember which line of the engine asked; whether it gets what it asked for."""
        site = _site(2)
        self.sites[site] = what
        return site != self._without

    @_unseen
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read, written, shared = set(), set(), set()
        for argument, value in zip_arguments(func._schema, args, kwargs):
            used = {self._storage(t) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)}
            alias = argument.alias_info
            running = argument.name in _RUNNING
            if (alias is not None and not alias.is_write) or (running and "backward" in str(func)):
                shared |= used  # a view only looks at the shape
            elif alias is not None or running:
                written |= used
            elif _FACTORY.search(func._schema.name):
                shared |= used
            else:
                read |= used
        result = func(*args, **kwargs)
        stream = self.current().number
        if self.capturing:
            for tensor in _tensors(result):
                self._storage(tensor, None)
            return result
        self.current().time += 1
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                made = self._storage(tensor, stream)
                if made not in read | written | shared:
                    written.add(made)
        names: dict[int, list[str]] = {storage: [] for storage in read | written}
        found = self.handler._handle_kernel_launch(stream, read - written, written, set(), str(func), names)
        self.errors += [_explain(error) for error in found]
        if func is torch.ops.aten._local_scalar_dense.default and _is_wait():
            self.host_waits.append(_site(1))
            self.handler._handle_stream_synchronization(stream)
        return result

    def _storage(self, tensor: Tensor, stream: int | None = 0) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._made:
            self._made[key] = stream
            self.handler._handle_memory_allocation(key)
            weakref.finalize(storage, self._freed, key)
        return key

    def _freed(self, key: int) -> None:
        """The next tensor made on the same stream may get this memory at once."""
        made, kept = self._made.pop(key), self._kept.pop(key, set())
        seen = self.handler.tensors_accessed
        write = seen.get_write(key)
        for access in [*seen.get_reads(key), *([write] if write is not None else [])]:
            ordered = made is None or self.handler.syncs.is_ordered_after(made, access.seq_num, access.stream)
            if not ordered and access.stream not in kept:
                self.errors.append(f"given back while stream {access.stream} may use it: {_where(access)}")
        self.handler._handle_memory_deallocation(key)


def _is_wait() -> bool:
    """Reading a number waits for the device, but where compiled kernels do not read it, or it is the caller's own."""
    file, name, _ = _nearest("/layerpipe", 2)
    return not file.endswith("/reference.py") and name != "frozen"


def qualified_name(frame: Any) -> str:
    """Of the function that runs."""
    if sys.version_info >= (3, 11):
        return frame.f_code.co_qualname  # type: ignore[no-any-return]
    name = frame.f_code.co_name
    for owner in type(frame.f_locals.get("self")).__mro__:
        if getattr(vars(owner).get(name), "__code__", None) is frame.f_code:
            return f"{owner.__name__}.{name}"
    return name  # type: ignore[no-any-return]


def _site(depth: int) -> Site:
    """The nearest line of the engine."""
    return _nearest("/layerpipe/", depth + 1)[1:]


def _nearest(folder: str, depth: int) -> tuple[str, str, int]:
    frame: Any = sys._getframe(depth)
    while frame is not None and folder not in frame.f_code.co_filename:
        frame = frame.f_back
    return ("", "", 0) if frame is None else (frame.f_code.co_filename, qualified_name(frame), frame.f_lineno)


class _Trace:
    """What the detector remembers of every access: whole stacks would take most of the time."""

    @staticmethod
    def walk_stack(frame: Any) -> None:
        return None

    class StackSummary:
        @staticmethod
        def extract(stack: None, lookup_lines: bool) -> list[Site]:
            return [_site(1)]


def _where(access: Any) -> str:
    name, line = access.stack_trace[0]
    return f"{access.type} in {access.operator}, {name}:{line}"


def _explain(error: Any) -> str:
    now, then = error.current_access, error.previous_access
    return f"race of streams {then.stream} and {now.stream}: {_where(then)}; then {_where(now)}"


@contextmanager
def fake_device(without: Site | None = None) -> Iterator[FakeDevice]:
    """The engine takes the CPU for a device with streams."""
    device = FakeDevice(without)
    with pytest.MonkeyPatch.context() as patch, device:
        patch.setattr(accelerator, "of", lambda *_: device)
        patch.setattr(streams, "get_gradient_edge", device.gradient_edge)
        patch.setattr(_sanitizer, "traceback", _Trace)
        yield device
