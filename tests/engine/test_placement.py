"""Where stages are, and how tensors get there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from layerpipe import executors
from layerpipe.accelerator import Accelerator
from layerpipe.executors import placement
from layerpipe.executors.channels import Channel, moved, tensors_in
from layerpipe.executors.streams import StreamChannel
from tests.engine.fake_device import FakeDevice
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline, sgd

CPU, META = torch.device("cpu"), torch.device("meta")  # a device whose tensors have a shape and no values


def test_stages_stay_where_they_are_and_those_without_weights_follow() -> None:
    stages = [nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2, device="meta"), nn.Tanh()]
    assert placement.place(stages, None) == [CPU, CPU, CPU, META, META]
    assert placement.place([nn.Tanh()], None) == [CPU]


def test_streams_get_a_connection_each_where_cuda_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"

    def asked(executor: str, before: str | None, *, started: bool = False) -> str | None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
        monkeypatch.setenv(name, before or "")  # which the end of the test takes back
        if before is None:
            monkeypatch.delenv(name)
        executors.check(executor)
        return os.environ.get(name)

    assert asked("streams", None) == asked("graphs", None) == "32"
    assert asked("graphs", "8") == "8"
    assert asked("graphs", None, started=True) is None
    assert asked("serial", None) is None


def test_stages_are_moved_before_their_optimizers_are_made() -> None:
    seen: list[str] = []

    def optimizer(params: list[Tensor], **past: Any) -> Any:
        seen.append(str(params[0].device))
        return sgd(params, **past)

    layerpipe.Pipeline(chain(2), F.cross_entropy, optimizer, devices=["cpu", "meta"], check_finite=False)
    assert seen == ["cpu", "meta"]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cpu"], r"devices must be one per stage, 2 in all, got \['cpu'\]"),
        ("cpu", "devices must be one per stage, 2 in all, got 'cpu'"),
        (["meta", "gpu"], r"devices\[1\]='gpu': .*gpu"),
        (["meta", 3.5], r"devices\[1\]=3.5: "),
    ],
)
def test_bad_devices_are_refused_before_anything_is_moved(devices: Any, message: str) -> None:
    stages = chain(2)
    with pytest.raises(ValueError, match=message):
        pipeline(stages, devices=devices)
    assert all(p.device == CPU for stage in stages for p in stage.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is not there")
def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"devices\[1\]='cuda'"):
        pipeline(chain(2), devices=["cpu", "cuda"])


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_naming_the_device_where_the_stages_are_changes_nothing(executor: str) -> None:
    states = []
    for devices in (None, ["cpu"] * 3):
        with pipeline(chain(3), executor=executor, devices=devices) as pipe:
            for x, y in minibatches(9):
                pipe.step(x, y)
            pipe.drain()
            states.append(pipe.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_channel_between_devices_copies_what_is_not_there_yet() -> None:
    channel = Channel("x", blocking=False, device=META)
    there = torch.empty(2, device=META)
    channel.put((torch.ones(3), there, None))
    copied, same, none = channel.get()
    assert (copied.device, copied.shape, same is there, none) == (META, (3,), True, None)
    item = (torch.ones(3),)
    assert moved(item, CPU) is item
    for tensor in (torch.ones(3, 1).expand(3, 4), torch.ones(3, 8)[:, ::2], torch.ones(4, 3).t()):
        (there,) = moved((tensor,), META)
        assert (there.shape, there.stride()) == (tensor.shape, tensor.stride())


def test_tensors_are_found_in_whatever_a_target_is() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert [t.numel() for t in tensors_in(({"x": a, "n": 3}, [b, (b,)], None, "s"))] == [1, 2, 2]
    assert list(tensors_in(a)) == [a]
    assert list(tensors_in({"y": b})) == [b]


def test_a_copy_between_devices_has_a_stream_of_its_own() -> None:
    """What is sent stays until it is copied, and the receiver's stream is current for the copy too."""
    sender, receiver = FakeDevice(), FakeDevice()
    receiver.device = META
    channel = StreamChannel("x", sender, receiver)
    used: list[tuple[int, int]] = []
    to = Tensor.to

    def copy(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        used.append((sender.current().number, receiver.current().number))
        return to(tensor, *args, **kwargs)

    x, stream, there = torch.ones(3), sender.stream(), receiver.stream()
    with sender.use(stream):
        channel.put((x, None))
    with pytest.MonkeyPatch.context() as patch, receiver.use(there):
        patch.setattr(Tensor, "to", copy)
        copied, _ = channel.get()
    assert copied.device == META
    ((on, for_),) = used
    assert on not in (0, stream.number)
    assert for_ == there.number
    assert sender._kept[x.untyped_storage()._cdata] == {on}
    assert StreamChannel("x", sender, sender)._copies is None


def test_of_a_sparse_gradient_both_parts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device keeps dense memory only."""
    kept: list[torch.Size] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: kept.append(tensor.shape))
    device: Any = object()
    Accelerator.keep(device, torch.eye(3).to_sparse(), "stream")
    Accelerator.keep(device, torch.eye(3), "stream")
    assert kept == [(2, 3), (3,), (3, 3)]
