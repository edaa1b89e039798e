"""The interface that streams and graphs need of a device, small, so that tests can put a device in its place that
checks every call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class Accelerator:
    """One device's streams, events and graphs, as ``torch.cuda`` and its like have them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)

    def stream(self) -> Any:
        """A new stream."""
        return self._module.Stream(self.device)

    def current(self) -> Any:
        """The stream that this device's work goes to now, in this thread."""
        return self._module.current_stream(self.device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Send this device's work to a stream."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def event(self, *, timed: bool = False) -> Any:
        """An event; a stream that waits for one never recorded waits for nothing.

        Args:
            timed: ``event.elapsed_time(later)`` shall say the ms between two that the device has come to.
        """
        return self._module.Event(enable_timing=timed)

    def wait(self) -> None:
        """The host waits until the device has done everything."""
        self._module.synchronize(self.device)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Nobody gets this tensor's memory before the stream has done what it was given while the tensor lived."""
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            part.record_stream(stream)

    def drawn(self) -> Any:
        """Another value after random numbers were drawn on the device; the host counts them."""
        return self._module.default_generators[self.device.index or 0].get_offset()

    def pool(self) -> Any:
        """Memory that several graphs share: those whose runs never overlap."""
        return self._module.graph_pool_handle()

    def forget_workspaces(self) -> None:
        """Let cuBLAS ask for new workspaces; the old ones stay in their pools. Memory that nobody uses goes back to the
        device: a capture cannot take what torch keeps for streams.

        It keeps one per thread and stream, and torch has 32 streams per device, which it gives out again and again: one
        from before a capture may lie in another graph's memory, and one of a graph be taken for other work.
        """
        if self.device.type == "cuda" and hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            torch._C._cuda_clearCublasWorkspaces()
        self._module.empty_cache()

    def capture(self, pool: Any, stream: Any, work: Callable[[], None]) -> Any:
        """A graph of what ``work`` launches, and nothing of it is run; ``graph.replay()`` runs it.

        Only this thread is told off for what no graph can hold: a data loader's may go on.
        """
        graph = self._module.CUDAGraph()
        with self.use(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says once more that the capture is broken
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


def ask_for_connections() -> None:
    """Has CUDA start with 32 connections to a device, one for each stream that torch has, unless the environment says
    otherwise (``CUDA_DEVICE_MAX_CONNECTIONS``). Streams beyond CUDA's default of 8 share one, and wait there for each
    other. CUDA reads the variable when it starts: afterwards this changes nothing."""
    if not torch.cuda.is_initialized():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def of(device: torch.device, executor: str) -> Accelerator:
    """The device's interface.

    Raises:
        ValueError: it has no streams.
    """
    if device.type == "cpu" or not hasattr(torch.get_device_module(device), "Event"):
        raise ValueError(f"executor={executor!r} needs a CUDA device; the stages are on {device}")
    # A parameter's gradient is put down by a node of its own stream, not the layer's: see Lane.
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    return Accelerator(device)
