"""What the processes of a test run; each is what a user's training script does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from layerpipe.tracing import Trace
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline

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
