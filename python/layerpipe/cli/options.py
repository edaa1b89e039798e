"""The options that ``train`` and ``compare`` share, each written once: what it is called, takes and means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from layerpipe.cli.optimizers import described
from layerpipe.data import LOADERS
from layerpipe.models import MODELS
from layerpipe.models.factory import is_name
from layerpipe_kernels.past import parse

NETWORK, METHOD, TRAINING, RUN = "Network and data", "Pipeline", "Training", "Run"

#: The most of anything that is counted.
MOST = 10**9

#: The most minibatches, or parts of one, whose schedule is simulated.
MOST_DRAWN = 10_000


def _option(help: str, panel: str, **kwargs: object) -> typer.models.OptionInfo:
    return typer.Option(help=help, rich_help_panel=panel, **kwargs)  # type: ignore[arg-type,no-any-return]


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def positive(value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value} is not more than 0")
    return finite(value)


def _epochs(value: float | None) -> float | None:
    if positive(value) is not None and value is not None and value > 1e6:
        raise typer.BadParameter(f"{value:g} is more than a million")
    return value


def _seed(value: int) -> int:
    """torch takes 64 bits, ``compare`` counts up from here."""
    if not -(2**63) <= value < 2**63:
        raise typer.BadParameter(f"{value} has more than 63 bits")
    return value


def _known(*names: str) -> Callable[[str | None], str | None]:
    """One of these, or a function of the user's."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names and not is_name(value):
            raise typer.BadParameter(f"{value!r} is unknown; there are: {', '.join(names)}, or package.module:function")
        return value

    return check


def _past(value: str) -> str:
    try:
        return str(parse(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Model = Annotated[
    str,
    _option(
        "resnet18: torchvision's, with the CIFAR stem. vgg11: eight convolutions. mlp: 12 fully connected layers. "
        "spiking: four layers of leaky integrate-and-fire neurons. vit, gpt: 8 transformer blocks. "
        "package.module:function: what a function of yours returns.",
        NETWORK,
        callback=_known(*MODELS),
    ),
]
Data = Annotated[
    str,
    _option(
        "digits: scikit-learn's scans, needs no download. python: for gpt, the sources of Python's own library. "
        "fashion-mnist, cifar10, cifar100: through torchvision; the first is also found where Debian's package "
        "dataset-fashion-mnist puts it. package.module:function: what a function of yours returns. Default: digits, "
        "python for gpt.",
        NETWORK,
        callback=_known(*LOADERS),
        show_default=False,
    ),
]
DataDir = Annotated[Path, _option("Where torchvision looks for data and downloads it to.", NETWORK)]
Width = Annotated[
    int,
    _option(
        "Channels of the first layer; 64 is ResNet-18 as published. Default: 32, 64 for vit, 128 for gpt.",
        NETWORK,
        min=1,
        max=MOST,
        show_default=False,
    ),
]
ChannelsLast = Annotated[
    bool,
    _option(
        "Keep convolutions' weights with their channels last: often faster. Takes a width of 8 or 16 on CPUs.", NETWORK
    ),
]
Stages = Annotated[int, _option("Pipeline stages.", METHOD, min=1, max=MOST)]
Balance = Annotated[
    Literal["flops", "time", "params"],
    _option("What every stage gets an equal share of: forward FLOPs, measured time, or parameters.", METHOD),
]
Past = Annotated[
    str,
    _option(
        "The weights a delayed backward sees. stash: kept copies, exact. latest: the current ones. ema: one average of "
        "the updates. momentum: the momentum buffer, extrapolated. blend: a few averages and the newest update. Its "
        "options follow between colons, as in blend:order=3:decay=coupled, ema:decay=window, ema:norm=match.",
        METHOD,
        callback=_past,
    ),
]
Schedule = Annotated[
    Literal["lockstep", "1f1b", "sequential", "auto"],
    _option(
        "lockstep: every stage runs a forward and a backward in every tick, and its gradients are 2 S updates late, S "
        "being the stages after it. 1f1b: PipeDream's order, S updates late. sequential: one minibatch at a time, no "
        "delay. auto: lockstep for streams and graphs, else 1f1b.",
        METHOD,
    ),
]
ExecutorName = Annotated[
    Literal["serial", "threads", "streams", "graphs", "distributed"],
    _option(
        "serial: all stages in one thread. threads: a worker thread per stage. streams, graphs: on a CUDA device (with "
        "--device cuda), each stage on streams of its own, or replayed as CUDA graphs. distributed: a process per "
        "stage, started here, or as many as torchrun starts on several machines.",
        METHOD,
    ),
]
Replicas = Annotated[
    int,
    _option(
        "Replicas of the pipeline, each of which takes its part of every minibatch; with --executor distributed. The "
        "processes that torchrun starts are divided by it; without torchrun, each has one process per stage.",
        METHOD,
        min=1,
        max=MOST,
    ),
]
OptimizerName = Annotated[
    Literal["sgd", "adamw", "nadam", "muon", "soap"],
    _option(
        "sgd with momentum; adamw; nadam with a momentum of 0.99; muon; soap. The last two precondition matrices, and "
        "bear delays best (docs/delay.md). Default: sgd, soap for gpt and vit.",
        TRAINING,
        show_default=False,
    ),
]
Lr = Annotated[
    float,
    _option(
        f"Learning rate after the warm-up. Default for images: {described(lambda d: d.lr_images)}; for text: "
        f"{described(lambda d: d.lr_text)}.",
        TRAINING,
        min=0.0,
        callback=finite,
        show_default=False,
    ),
]
Momentum = Annotated[
    float,
    _option("Of sgd (default: 0.9) and muon (0.95).", TRAINING, min=0.0, max=1.0, callback=finite, show_default=False),
]
WeightDecay = Annotated[
    float,
    _option(
        f"Weight decay. Default: {described(lambda d: d.weight_decay)}.",
        TRAINING,
        min=0.0,
        callback=finite,
        show_default=False,
    ),
]
SpikeCompensation = Annotated[
    float,
    _option(
        "How much more a late gradient weighs beside the average of gradients: 0 as ever, 1 fully. "
        f"Default: {described(lambda d: d.spike_compensation)}.",
        TRAINING,
        min=0.0,
        callback=finite,
        show_default=False,
    ),
]
WeightPrediction = Annotated[
    float,
    _option(
        "By what part of its delay a stage trains ahead of its weights: 0 not at all, 1 all of it. "
        f"Default: {described(lambda d: d.weight_prediction)}.",
        TRAINING,
        min=0.0,
        callback=finite,
        show_default=False,
    ),
]
Accumulate = Annotated[
    int,
    _option(
        "Update once in so many minibatches, by the mean of their gradients: as many times smaller a delay, from "
        "minibatches that may be as many times smaller, too.",
        METHOD,
        min=1,
        max=MOST,
    ),
]
SyncSteps = Annotated[
    int, _option("So many first minibatches one at a time, without a delay.", METHOD, min=0, max=MOST)
]
BatchSize = Annotated[
    int,
    _option("Images or texts per minibatch. Default: 64, 16 for gpt.", TRAINING, min=1, max=MOST, show_default=False),
]
Epochs = Annotated[
    float | None,
    _option(
        "Passes over the training data, instead of --steps; may be a fraction.",
        TRAINING,
        min=0.0,
        callback=_epochs,
    ),
]
Steps = Annotated[int | None, _option("Minibatches. Default: 600.", TRAINING, min=1, max=MOST, show_default=False)]
LrSchedule = Annotated[
    Literal["constant", "cosine", "linear"], _option("After the warm-up: stay, or go down to 0.", TRAINING)
]
Warmup = Annotated[
    int | None,
    _option(
        "Steps over which the learning rate rises linearly. Default: 50, or half of a run of fewer than 100.",
        TRAINING,
        min=0,
        max=MOST,
        show_default=False,
    ),
]
MaxNorm = Annotated[
    float | None,
    _option(
        "Clip the norm of each stage's gradient to this. Default: no clipping, 1 for gpt and vit.",
        TRAINING,
        min=0.0,
        callback=positive,
        show_default=False,
    ),
]
Seed = Annotated[int, _option("Of the initial weights and the order of the data.", TRAINING, callback=_seed)]
Device = Annotated[str, _option("cpu, cuda, cuda:1, ...", RUN)]
Profile = Annotated[
    bool, _option("Write a trace of 50 ticks for chrome://tracing or ui.perfetto.dev, and say where time went.", RUN)
]
SplitBackward = Annotated[
    bool,
    _option("Send gradients of activations on before those of the weights are computed: the same numbers.", METHOD),
]
CheckpointEvery = Annotated[
    int | None,
    _option(
        "Drain the pipe and write a checkpoint every so many minibatches, for --resume. Default: never.",
        RUN,
        min=1,
        max=MOST,
        show_default=False,
    ),
]
Resume = Annotated[
    Path | None,
    _option(
        "Go on with the run in this directory from its last checkpoint, with its options, as if it had not stopped.",
        RUN,
        show_default=False,
    ),
]
Timeout = Annotated[
    float,
    _option(
        "Seconds that a process of --executor distributed waits for another before it gives up.",
        RUN,
        min=1,
        callback=finite,
    ),
]
Out = Annotated[Path | None, _option("Directory to write to. Default: runs/<name>, made new.", RUN, show_default=False)]
