"""``layerpipe plan``: what a pipeline of a model would be, before a step is trained."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from layerpipe.cli import options as o
from layerpipe.cli import plan_plots, plan_report
from layerpipe.cli.runs import import_from_here
from layerpipe.errors import UsageError
from layerpipe.models import catalog
from layerpipe.models.catalog import InputShape
from layerpipe.models.sizes import out_of_memory, reason
from layerpipe.partition.profile import profile
from layerpipe.theory.planning import plan as planning
from layerpipe.theory.planning.machine import Machine
from layerpipe.theory.simulate import Link, to_chrome

CUT, MACHINE, OUTPUT = "Cut and schedule", "Machine", "Output"
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def _option(help: str, panel: str, *names: str, shown: bool = False, **kwargs: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=shown, **kwargs)


def plan(
    model: Annotated[
        str,
        typer.Argument(help="resnet18, resnet50, vgg16, gpt2, mlp, or package.module:factory", show_default=False),
    ],
    settings: Annotated[
        list[str] | None, _option("name=value for the model's factory, e.g. layers=48. Repeatable.", o.NETWORK, "--set")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        _option(
            "Sizes of one example without the minibatch, with a dtype where it is not float32: 3,224,224 or "
            "1024:int64; name=1024:int64 for a keyword argument. Again for a second input.",
            o.NETWORK,
            "--input",
        ),
    ] = None,
    batch_size: Annotated[int, _option("Examples per minibatch.", o.NETWORK, min=1, max=o.MOST, shown=True)] = 32,
    stages: Annotated[int | None, _option("Stages. Default: 4.", CUT, min=1, max=o.MOST)] = None,
    memory_per_stage: Annotated[
        str | None,
        _option("Bytes that no stage may exceed, e.g. 16G; without --stages as few of them as can be.", CUT),
    ] = None,
    schedule: Annotated[
        Literal["lockstep", "1f1b", "sequential"],
        _option("Delays and memory are this one's. gpipe delays nothing, as sequential.", CUT, shown=True),
    ] = "lockstep",
    past: o.Past = "blend",
    momentum: Annotated[float, _option("SGD's momentum.", CUT, min=0.0, max=1.0, shown=True)] = 0.9,
    balance: Annotated[
        Literal["roofline", "flops", "time", "params", "bytes"],
        _option(
            "What stages get an equal share of. roofline: seconds on the machine below. time: seconds measured here, "
            "one thread; allocates the model.",
            CUT,
            shown=True,
        ),
    ] = "roofline",
    microbatches: Annotated[
        int | None,
        _option(
            "Parts of a minibatch under gpipe. Default: 8, if it has as many examples.", CUT, min=1, max=o.MOST_DRAWN
        ),
    ] = None,
    accumulate: Annotated[int, _option("Minibatches per update.", CUT, min=1, max=o.MOST_DRAWN, shown=True)] = 1,
    compute_rate: Annotated[str, _option("FLOP/s of a processor.", MACHINE, shown=True)] = "19.5T",
    memory_rate: Annotated[str, _option("Bytes/s of its memory.", MACHINE, shown=True)] = "1555G",
    link_rate: Annotated[str, _option("Bytes/s between two processors, each way.", MACHINE, shown=True)] = "32G",
    link_latency: Annotated[float, _option("Seconds.", MACHINE, min=0.0, shown=True, callback=o.finite)] = 5e-6,
    derivation: Annotated[bool, _option("Print how the delays are derived.", OUTPUT, "--derivation")] = False,
    as_json: Annotated[bool, _option("Print everything as JSON, and nothing else.", OUTPUT, "--json")] = False,
    plot: Annotated[Path | None, _option("Draw into this directory.", OUTPUT)] = None,
    trace: Annotated[Path | None, _option("Write the schedules for chrome://tracing or Perfetto.", OUTPUT)] = None,
) -> int:
    """Cut a model into stages and say what each schedule would give: delays, memory, throughput. Allocates nothing."""
    machine = Machine(
        flops=quantity(compute_rate, "--compute-rate"),
        memory=quantity(memory_rate, "--memory-rate"),
        link=Link(quantity(link_rate, "--link-rate"), link_latency),
    )
    if microbatches is not None and microbatches > batch_size:
        raise UsageError(f"--microbatches {microbatches}: a minibatch has --batch-size {batch_size} examples")
    memory = None if memory_per_stage is None else quantity(memory_per_stage, "--memory-per-stage")
    measure = balance == "time"
    import_from_here()
    try:
        network, inputs = catalog.load(
            model,
            batch=batch_size,
            options=dict(_setting(text) for text in settings or ()),
            inputs=[input_shape(text) for text in shapes or ()],
            device="cpu" if measure else "meta",
        )
        if measure:
            torch.set_num_threads(1)
        found = planning.plan(
            profile(network, inputs, measure=measure),
            stages=stages,
            memory_per_stage=memory,
            schedule=schedule, past=past, momentum=momentum, balance=balance, machine=machine,
            microbatches=min(8, batch_size) if microbatches is None else microbatches, accumulate=accumulate,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UsageError(f"{model} does not fit here; --balance flops allocates nothing: {reason(error)}") from error
    try:
        if trace:
            trace.parent.mkdir(parents=True, exist_ok=True)
            trace.write_text(to_chrome(found.timelines), encoding="utf-8")
        if plot:
            plot.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}") from error
    written = [str(path) for path in plan_plots.draw(found, plot)] if plot else []
    if as_json:
        print(json.dumps({"model": model, "batch_size": batch_size, **found.to_json()}, indent=1))
        return 0
    console = Console()
    for part in plan_report.report(found, model, batch_size, measured=measure):
        console.print(part, highlight=False)
    if derivation:
        console.print(str(found.derivation), highlight=False, markup=False)
    if written or trace:
        console.print(f"Written: {', '.join([*written, *([str(trace)] if trace else [])])}", highlight=False)
    return 0


def quantity(text: str, option: str) -> float:
    """``16G`` is 16e9.

    Raises:
        UsageError: not a positive number with an optional k, M, G or T.
    """
    number, unit = (text[:-1], _UNITS[text[-1].lower()]) if text[-1:].lower() in _UNITS else (text, 1.0)
    try:
        value = float(number) * unit
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{option} {text!r} is not a positive number, with k, M, G or T behind it or without")
    return value


def input_shape(text: str) -> InputShape:
    """``3,224,224``, ``1024:int64`` or ``attention_mask=1024:int64``.

    Raises:
        UsageError: not sizes, or an unknown dtype.
    """
    name, _, shape = text.rpartition("=")
    sizes, _, dtype = shape.partition(":")
    try:
        numbers = tuple(int(size) for size in sizes.split(","))
        kind: Any = getattr(torch, dtype or "float32")
        if not isinstance(kind, torch.dtype) or min(numbers) < 1 or (name and not name.isidentifier()):
            raise ValueError
    except (ValueError, AttributeError):
        raise UsageError(f"--input {text!r} is not a shape like 3,224,224 or 1024:int64") from None
    return InputShape(numbers, kind, name)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--set {text!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
