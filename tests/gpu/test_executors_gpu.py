"""Streams and graphs on a GPU: the numbers of the serial executor, and a host that waits for nothing."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe.tracing import Trace
from layerpipe.tracing.spans import INNER, Span
from tests.engine.models import chain, minibatches
from tests.engine.stream_networks import network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("chain", 1, {}),
    ("chain", 2, {}),
    ("chain", 4, {}),
    ("chain", 4, {"past": "stash"}),
    ("chain", 3, {"past": "ema", "max_norm": 1.0}),
    ("chain", 4, {"schedule": "1f1b"}),
    ("chain", 3, {"split_backward": True}),
    ("skip", 4, {}),
]


def pipeline(stages: list[nn.Module], executor: str, rule: str = "SGD", **options: Any) -> layerpipe.Pipeline:
    def optimizer(params: list[Tensor], **past: Any) -> Any:
        if rule == "SGD":
            return lk.SGD(params, lr=torch.tensor(0.05, device="cuda"), momentum=0.9, capturable=True, **past)
        return lk.AdamW(params, lr=torch.tensor(0.01, device="cuda"), capturable=True, **past)

    return layerpipe.Pipeline(
        [stage.cuda() for stage in stages], F.cross_entropy, optimizer, executor=executor, **options
    )


def batches(count: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(x.cuda(), y.cuda()) for x, y in minibatches(count, size)]


def train(pipe: layerpipe.Pipeline, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    scheduler = torch.optim.lr_scheduler.LambdaLR(pipe.optimizer, lambda step: 1 / (1 + step))
    losses: list[Tensor] = []
    for i, (x, y) in enumerate(data):
        loss = pipe.step(x.clone(), y.clone())
        losses += [loss] if loss is not None else []
        scheduler.step()
        if i == len(data) // 2:
            losses += pipe.drain()
    return torch.stack(losses + pipe.drain())


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_streams_and_graphs_give_the_numbers_of_serial_bit_for_bit(
    case: tuple[str, int, dict[str, Any]], rule: str
) -> None:
    kind, count, options = case
    data, losses, states = batches(60), [], []
    for executor in ("serial", "streams", "graphs"):
        pipe = pipeline(network(kind, count), executor, rule, **options)
        losses.append(train(pipe, data))
        states.append(copy.deepcopy(pipe.state_dict()))
        pipe.close()
    for other in (1, 2):
        assert torch.equal(losses[0], losses[other])
        assert [name for name in states[0] if not torch.equal(states[0][name], states[other][name])] == []


@pytest.mark.parametrize("executor", ["streams", "graphs"])
def test_a_tick_waits_for_nothing_on_the_host(executor: str) -> None:
    pipe = pipeline(chain(4), executor, max_norm=1.0)
    data = batches(40)
    for x, y in data[:25]:  # state and plans are made, and graphs captured
        pipe.step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[25:]:
            pipe.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pipe.close()


@pytest.mark.parametrize("executor", ["streams", "graphs"])
def test_a_trace_has_the_devices_clock_and_changes_nothing(executor: str) -> None:
    data, states = batches(60), []
    for watch in (False, True):
        pipe = pipeline(chain(4), executor)
        trace = Trace(pipe.names)
        for x, y in data[:30]:  # graphs are captured, and what began before has left
            pipe.step(x, y)
        began = time.perf_counter()
        pipe.watch(trace if watch else None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x, y in data[30:50]:
                pipe.step(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        pipe.watch(None)
        ended = time.perf_counter()
        for x, y in data[50:]:
            pipe.step(x, y)
        pipe.drain()
        states.append(copy.deepcopy(pipe.state_dict()))
        pipe.close()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(trace.host) == 20
    close = 1e-3  # seconds; the host notes when it has issued an origin, which the device may come to a little later
    assert 0 < trace.seconds() <= ended - began + close
    for s, (spans, seconds) in enumerate(zip(trace.stages, trace.times(), strict=True)):
        names = [span.name for span in spans]
        assert (
            sum(name[0] == "F" for name in names) == sum(name[0] == "B" for name in names) == names.count("step") == 20
        )
        assert names.count("channel") == (20 if s == 3 else 40)
        assert ("past weight" in names) == (executor == "streams" and s < 3)
        assert all(began - close <= span.start <= span.end <= ended + close for span in spans)
        inner: list[Span] = []
        for span in spans:
            if span.name in INNER:
                inner.append(span)
                continue
            assert all(span.start - 2e-6 <= part.start and part.end <= span.end + 2e-6 for part in inner)
            assert {part.stream for part in inner} == {span.stream}
            inner = []
        assert seconds.compute > 0 < seconds.step
        assert 0 < seconds.utilisation <= 1
        # Ordered by what the streams wait for: an update, then everything else of the stage.
        for i, span in enumerate(spans):
            if span.name[0] == "B":
                assert all(after.start >= span.end - 2e-6 for after in spans[i + 1 :])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("executor", ["streams", "graphs"])
def test_a_trace_of_two_devices_has_one_axis(executor: str) -> None:
    """A minibatch leaves a stage after it has left the one that it came from."""
    with pipeline(chain(2), executor, devices=["cuda:0", "cuda:1"]) as pipe:
        data = batches(40)
        for x, y in data[:20]:
            pipe.step(x, y)
        pipe.watch(trace := Trace(pipe.names))
        for x, y in data[20:]:
            pipe.step(x, y)
        pipe.watch(None)
    first, last = ({span.name: span for span in spans} for spans in trace.stages)
    for name in first.keys() & last.keys():
        if name[0] == "F":
            assert last[name].end >= first[name].end - 1e-3
        if name[0] == "B":
            assert first[name].end >= last[name].start - 1e-3


@pytest.mark.parametrize("executor", ["serial", "threads", "streams", "graphs"])
def test_stages_may_name_the_same_device(executor: str) -> None:
    states = []
    for devices in (None, ["cuda:0", "cuda:0"]):
        with pipeline(chain(2), executor, devices=devices) as pipe:
            train(pipe, batches(20))
            states.append(copy.deepcopy(pipe.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("executor", ["serial", "threads", "streams", "graphs"])
def test_stages_on_two_devices_give_the_numbers_of_one(executor: str) -> None:
    states = []
    for devices in (["cuda:0"] * 2, ["cuda:0", "cuda:1"]):
        with pipeline(chain(2), executor, devices=devices) as pipe:
            train(pipe, batches(20))
            states.append({name: value.cpu() for name, value in pipe.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("executor", ["serial", "streams", "graphs"])
def test_peak_memory_stays_where_it_is_after_the_first_ticks(
    executor: str, record_property: pytest.RecordProperty
) -> None:
    stages: list[nn.Module] = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(3)]
    pipe = pipeline([*stages, nn.Linear(512, 3)], executor)
    data = [(x.repeat(1, 86)[:, :512], y) for x, y in batches(120)]
    for x, y in data[:40]:
        pipe.step(x, y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for x, y in data[40:60]:
        pipe.step(x, y)
    torch.cuda.synchronize()
    first = torch.cuda.max_memory_allocated()
    for x, y in data[60:]:
        pipe.step(x, y)
    torch.cuda.synchronize()
    last = torch.cuda.max_memory_allocated()
    pipe.close()
    record_property("peak_mib", last / 2**20)
    print(f"{executor}: {last / 2**20:.1f} MiB")
    assert last <= 1.1 * first
