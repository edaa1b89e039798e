"""What the processes of a test run; each is what a user's training script does."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe.cli import main
from layerpipe.tracing import Trace
from tests.distributed.hosts import cable
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline, sgd

State = dict[str, Any]


def train(rank: int, executor: str, stages: int, options: State, rounds: list[int], sizes: list[int]) -> State:
    """Train, drain and train again, with a learning-rate schedule; everything a pipeline can tell."""
    with pipeline(chain(stages), executor=executor, **options) as pipe:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.97)
        losses: list[Any] = []
        fed = 0
        for count in rounds:
            for _ in range(count):
                x, y = minibatches(1, size=sizes[fed % len(sizes)], seed=fed)[0]
                first, last = 0 in pipe.ranks.own, stages - 1 in pipe.ranks.own
                loss = pipe.step(x if first else None, y if last else None)
                losses.append(None if loss is None else loss.item())
                scheduler.step()
                fed += 1
            losses.append([loss.item() for loss in pipe.drain()])
        pipe.eval()
        return {
            "losses": losses,
            "latency": pipe.latency,
            "state": {name: value.clone() for name, value in pipe.state_dict().items()},
            "output": pipe(minibatches(1)[0][0]).detach(),
            "measured": pipe.measured_delays(),
            "memory": pipe.memory(),
            "in_flight": pipe.in_flight,
            "own": [stage.index for stage in pipe.stages],
        }


def drop(rank: int, executor: str) -> State:
    """Train with dropout; where processes differ in what they have drawn before, the first one counts."""
    stages = [nn.Sequential(nn.Dropout(0.3), stage) for stage in chain(5)]
    torch.rand(rank)
    with pipeline(stages, executor=executor) as pipe:
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.drain()
        return pipe.state_dict()


class _Pair(nn.Module):
    """Hands on a tensor, its positions as integers, and a third that nobody uses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, dtype=dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x.to(self.dtype))
        return y, y.detach().argsort(1), y * 2


class _Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, y: Tensor, order: Tensor, unused: Tensor) -> Tensor:
        return self.linear(y.float().gather(1, order))


def exchange(rank: int, executor: str) -> State:
    torch.manual_seed(0)
    with pipeline([_Pair(torch.bfloat16), _Sorted()], executor=executor) as pipe:
        losses = [pipe.step(x, y) for x, y in [*minibatches(6), *minibatches(3, size=1), *minibatches(4)]]
        found = [loss for loss in [*losses, *pipe.drain()] if loss is not None]
        return {"losses": [loss.item() for loss in found], "state": pipe.state_dict()}


class _Transposed(nn.Linear):
    """Hands on what lies column by column, images whose channels lie together, one for many, and with gaps."""

    gradients: Tensor

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("gradients", torch.zeros(3, dtype=torch.long))

    def note(self, grad: Tensor) -> None:
        self.gradients.copy_(torch.tensor(grad.stride()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y = super().forward(x)
        images = y.view(-1, 3, 2, 1).expand(-1, -1, -1, 2)
        expanded = y.t().contiguous().t().view(-1, 1, 6).expand(-1, 4, -1)
        if expanded.requires_grad:
            expanded.register_hook(self.note)
        gapped = y.repeat(1, 3).chunk(3, 1)[1]
        return y.t().contiguous().t(), images.contiguous(memory_format=torch.channels_last), expanded, gapped


class _Strides(nn.Linear):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("seen", torch.zeros(11, dtype=torch.long))

    def forward(self, x: Tensor, images: Tensor, expanded: Tensor, gapped: Tensor) -> Tensor:  # type: ignore[override]
        self.seen.copy_(torch.tensor([*x.stride(), *images.stride(), *expanded.stride(), *gapped.stride()]))
        return super().forward(x + images.mean(3).flatten(1) + expanded.sum(1) + F.gelu(gapped))


def strides(rank: int, executor: str) -> State:
    torch.manual_seed(0)
    with pipeline([_Transposed(), _Strides()], executor=executor) as pipe:
        for x, y in minibatches(6):
            pipe.step(x, y)
        pipe.drain()
        return pipe.state_dict()


def loss_bytes(rank: int) -> int:
    with pipeline(chain(2), executor="distributed") as pipe:
        losses = [pipe.step(x, y) for x, y in minibatches(4)]
        pipe.drain()
        return max(loss.untyped_storage().nbytes() for loss in losses if loss is not None)


def cosine(pipe: layerpipe.Pipeline) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(pipe.optimizer, 18)


def shown(pipe: layerpipe.Pipeline) -> list[State]:
    """What a logger sees of every stage's parameter groups."""
    return [{k: v for k, v in group.items() if k != "params"} for group in pipe.optimizer.param_groups]


def drained_once(rank: int, executor: str) -> State:
    """What :func:`write` and :func:`go_on` do together, without a file."""
    with pipeline(chain(4), executor=executor) as pipe:
        scheduler = cosine(pipe)
        for i, (x, y) in enumerate(minibatches(18)):
            pipe.step(x, y)
            scheduler.step()
            if i == 9:
                pipe.drain()
        pipe.drain()
        return {"state": pipe.state_dict(), "scheduler": scheduler.state_dict(), "options": shown(pipe)}


def write(rank: int, executor: str, path: str | None) -> bool:
    with pipeline(chain(4), executor=executor) as pipe:
        scheduler = cosine(pipe)
        for x, y in minibatches(10):
            pipe.step(x, y)
            scheduler.step()
        pipe.checkpoint(path, scheduler=scheduler.state_dict())
        return True


def write_and_go_on(rank: int, keeper: int, path: str) -> State:
    """One process has a file; the others know none."""
    own = path if rank == keeper else None
    write(rank, "distributed", own)
    return go_on(rank, "distributed", own)


def go_on(rank: int, executor: str, path: str | None, past: str = "blend") -> State:
    with pipeline(chain(4, seed=7), executor=executor, past=past) as pipe:
        scheduler = cosine(pipe)
        extra = pipe.resume(path)
        scheduler.load_state_dict(extra["scheduler"])
        for x, y in minibatches(18)[10:]:
            pipe.step(x, y)
            scheduler.step()
        pipe.drain()
        return {"state": pipe.state_dict(), "scheduler": scheduler.state_dict(), "options": shown(pipe)}


def draw(rank: int, path: str, resume: bool) -> list[float]:
    """Random numbers after a checkpoint, or after resuming from it."""
    with pipeline(chain(2), executor="distributed") as pipe:
        torch.manual_seed(17 if resume else rank)
        if resume:
            pipe.resume(path)
        else:
            pipe.checkpoint(path)
    return torch.rand(3).tolist()


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


class _Fails(nn.Module):
    def __init__(self, where: str, calls: int) -> None:
        super().__init__()
        self.linear, self.where, self.calls = nn.Linear(6, 6), where, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0 and self.where == "forward":
            raise ArithmeticError("on purpose")
        y = self.linear(x)
        return _Raises.apply(y) if self.calls < 0 and self.where == "backward" else y  # type: ignore[no-any-return,no-untyped-call]


def fails(rank: int, where: str, calls: int) -> None:
    """Stage 1 or the loss raises at some time; the others would train on for long."""
    count = iter(range(calls))

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if where == "loss" and next(count, None) is None:
            raise ArithmeticError("on purpose")
        return F.cross_entropy(output, target)

    stages = [chain(2)[0], _Fails(where, calls), nn.Linear(6, 3)]
    with layerpipe.Pipeline(stages, loss_fn, sgd, executor="distributed") as pipe:
        for x, y in minibatches(200):
            pipe.step(x, y)


def diverges(rank: int) -> None:
    with pipeline(chain(3), executor="distributed") as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == 9 and rank == 2:
                with torch.no_grad():
                    next(pipe.parameters()).fill_(float("nan"))
            pipe.step(x, y)


def interrupted(rank: int, victim: int) -> None:
    with pipeline(chain(3), executor="distributed") as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == 9 and rank == victim:
                os.kill(os.getpid(), signal.SIGINT)
            pipe.step(x, y)


def dies(rank: int, victim: int, after: int) -> None:
    with pipeline(chain(3), executor="distributed") as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == after and rank == victim:
                os._exit(1)
            pipe.step(x, y)


def unplugged(rank: int, host: int, seconds: float) -> None:
    """The process of this rank takes its host off the network; the group waits so long for a tensor."""
    store, size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("impatient", store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        with pipeline(chain(3), executor="distributed") as pipe:
            for i, (x, y) in enumerate(minibatches(200)):
                if i == 9 and rank == host:
                    cable("down")
                pipe.step(x, y)
    finally:
        if rank == host:
            cable("up")


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


def uneven(rank: int, counts: list[int]) -> None:
    with pipeline(chain(2), executor="distributed") as pipe:
        for x, y in minibatches(counts[rank]):
            pipe.step(x, y)
        pipe.drain()


def closes(rank: int, who: int) -> str:
    pipe = pipeline(chain(2), executor="distributed")
    for i, (x, y) in enumerate(minibatches(200)):
        if rank == who and i == 5:
            pipe.close()
            return "closed"
        pipe.step(x, y)
    return "trained"


def interleaved(rank: int, executor: str) -> list[State]:
    with pipeline(chain(2), executor=executor) as one, pipeline(chain(4, seed=3), executor=executor) as other:
        for x, y in minibatches(9):
            one.step(x, y)
            one(x)  # in train mode, to have BatchNorm's statistics move too
            other.step(x, y)
        one.drain()
        other.drain()
        return [one.state_dict(), other.state_dict()]


def traced(rank: int) -> list[list[str]]:
    with pipeline(chain(4), executor="distributed") as pipe:
        data = minibatches(12)
        for x, y in data[:8]:
            pipe.step(x, y)
        pipe.watch(trace := Trace(pipe.names))
        for x, y in data[8:]:
            pipe.step(x, y)
        pipe.watch(None)
        return [[span.name for span in row] for row in trace.stages]


def cut_differently(rank: int) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    pipeline(layerpipe.split(model, 2, at=["1" if rank else "2"]), executor="distributed")


def refuses(rank: int, stage: int) -> None:
    """Stages have delays of 6, 4, 2 and 0; the factory fails for one of them."""

    def optimizer(params: list[Tensor], **past: Any) -> Any:
        if past["delay"] == 6 - 2 * stage:
            raise ArithmeticError("on purpose")
        return sgd(params, **past)

    layerpipe.Pipeline(chain(4), F.cross_entropy, optimizer, executor="distributed")


def untrained(rank: int) -> None:
    pipeline([*chain(2), nn.Tanh(), nn.Tanh()], executor="distributed")


def closes_inside(rank: int, stage: int, where: str, at: int, size: int) -> str:
    """Close the pipeline inside the ``at``-th forward, backward or loss of a stage; what each process is told.

    Whoever has been told waits for the others: the end of a process says more than a message.
    """
    stages = chain(6)
    calls: list[layerpipe.Pipeline] = []

    def call(value: Tensor) -> Tensor:
        calls.append(pipe)
        if len(calls) == at:
            pipe.close()
        return value

    if where == "forward":
        stages[stage].register_forward_pre_hook(lambda module, inputs: (call(inputs[0]),))
    elif where == "backward":
        first: Any = next(stages[stage].parameters())
        first.register_hook(call)
    loss_fn = F.cross_entropy if where != "loss" else lambda output, target: call(F.cross_entropy(output, target))
    pipe = layerpipe.Pipeline(stages, loss_fn, sgd, executor="distributed")
    said = "trained"
    try:
        for x, y in minibatches(30, size=size):
            pipe.step(x, y)
        pipe.drain()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()
    return said


def disagrees(rank: int, what: str) -> str:
    """A script that was started in its second process with something else."""
    other = rank == 1
    seed, dtype, options = 0, torch.float32, State()
    stages = chain(4)
    lr, momentum, kind = 0.05, 0.9, sgd
    if what == "lr":
        lr = 0.1 if other else lr
    elif what == "momentum":
        momentum = 0.5 if other else momentum
    elif what == "class":
        kind = (lambda params, **past: lk.AdamW(params, **past)) if other else kind
    elif what == "seed":
        seed = 7 if other else seed
    elif what == "dtype":
        dtype = torch.float64 if other else dtype
    elif what == "weights":
        stages = chain(4, seed=int(other))
    elif what == "buffers" and other:
        stages[2][1].running_mean.add_(1)  # type: ignore[index,union-attr,operator]
    elif what == "stages":
        stages = chain(5 if other else 4)
    elif what in ("max_norm", "schedule", "past", "split_backward", "check_finite"):
        values = {
            "max_norm": (None, 1.0), "schedule": ("lockstep", "1f1b"), "past": ("blend", lk.Blend(order=1)),
            "split_backward": (False, True), "check_finite": (True, False),
        }  # fmt: skip
        options[what] = values[what][other]

    def optimizer(params: list[Tensor], **past: Any) -> Any:
        if what == "nothing, and every stage has a rate of its own":
            return lk.SGD(params, lr=0.05 / (1 + past["delay"]), momentum=0.9, **past)
        if what == "nothing, and only own stages have a rate":
            return lk.SGD(params, lr=rates[params[0]], momentum=0.9, **past)
        return kind(params, **past) if what == "class" else lk.SGD(params, lr=lr, momentum=momentum, **past)

    own = range(2 * rank, 2 * rank + 2)
    rates = {next(stages[i].parameters()): 0.01 * (i + 1) for i in own}
    torch.manual_seed(seed)
    stages = [stage.to(dtype) for stage in stages]
    try:
        layerpipe.Pipeline(stages, F.cross_entropy, optimizer, executor="distributed", **options).close()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "made"


def one_command_each(
    rank: int, size: int, master: tuple[str, int], directory: str, commands: list[list[str]]
) -> tuple[Any, str, str]:
    """As :func:`command`, with arguments of each process's own."""
    return command(rank, size, master, directory, commands[rank], True)
