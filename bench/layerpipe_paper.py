"""LayerPipe's schedule beside PipeDream's, on the layer shapes of VGG-16 and ResNet-50: simulated, not run.

    python -m bench.layerpipe_paper

The setting of the claim of LayerPipe (arXiv 2108.06629: "an average speedup of 25% and upwards of 80% with 7 to 9
processors ... when compared to PipeDream"), as far as its abstract gives it. Ours: times are FLOPs; processors are
equal; links are free; both networks at 224 x 224 with one image per minibatch; PipeDream's schedule is 1F1B on the best
cut into whole layers, without replicated stages. ``blocks`` cuts ResNet-50 between its residual blocks only.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

from rich.table import Table

from bench.report import console, save
from layerpipe.models import catalog
from layerpipe.partition.balance import balance
from layerpipe.partition.layers import LayerGraph
from layerpipe.partition.profile import profile
from layerpipe.theory.simulate import StageCost, layerpipe, one_f_one_b, report, run, together

CLAIMED = (7, 8, 9)
#: Layers, and the bytes of each one's weights.
Network = tuple[list[StageCost], list[int]]


def costs(layers: LayerGraph) -> Network:
    """FLOPs in place of seconds."""
    pairs = zip(layers.layers, layers.crossing, strict=False)
    return [StageCost(a.forward_flops, a.backward_flops, a.gradient_flops, received=size) for a, size in pairs], [
        layer.weights for layer in layers.layers
    ]


def blocks(layers: LayerGraph) -> Network:
    """Layers whose names share their first two parts, such as ``layer1.0``, as one."""
    names = [".".join(layer.name.split(".")[:2]) for layer in layers.layers]
    found: dict[str, list[tuple[StageCost, int]]] = {}
    for name, cost, weights in zip(names, *costs(layers), strict=True):
        found.setdefault(name, []).append((cost, weights))
    return [together([c for c, _ in group]) for group in found.values()], [sum(w for _, w in g) for g in found.values()]


def compare(network: Network, processors: int, minibatches: int = 200) -> dict[str, float]:
    """Time per minibatch of both schedules, as multiples of a perfect split."""
    layers, weights = network
    cuts = balance([layer.seconds for layer in layers], processors)
    stages = [together(layers[a:b]) for a, b in itertools.pairwise(cuts)]
    perfect = sum(layer.seconds for layer in layers) / processors
    pipedream = report(run(one_f_one_b(stages, minibatches)))
    ours = report(run(layerpipe(layers, processors, minibatches, weights), processors=processors))
    return {
        "processors": processors,
        "1f1b": pipedream.period / perfect,
        "layerpipe": ours.period / perfect,
        "speedup": pipedream.period / ours.period,
        "1f1b staleness": max(pipedream.staleness),
        "layerpipe staleness": max(ours.staleness),
        "1f1b bytes": pipedream.bytes_sent,
        "layerpipe bytes": ours.bytes_sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processors", type=int, nargs="+", default=[4, 6, 7, 8, 9, 10, 12])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    networks = {}
    for name in ("vgg16", "resnet50"):
        layers = profile(*catalog.load(name, batch=1))
        networks[name] = costs(layers)
        if name == "resnet50":
            networks["resnet50, blocks"] = blocks(layers)
    found = {name: [compare(layers, n) for n in options.processors] for name, layers in networks.items()}
    table = Table(
        title="Time per minibatch over a perfect split; speed-up of layerpipe over 1f1b", title_justify="left"
    )
    for column in ("network", "processors", "1f1b", "layerpipe", "speed-up", "staleness", "MB sent"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, rows in found.items():
        for row in rows:
            table.add_row(
                name, f"{row['processors']}", f"{row['1f1b']:.2f}", f"{row['layerpipe']:.2f}", f"{row['speedup']:.2f}",
                f"{row['1f1b staleness']}, {row['layerpipe staleness']}",
                f"{row['1f1b bytes'] / 1e6:.1f}, {row['layerpipe bytes'] / 1e6:.1f}",
            )  # fmt: skip
        table.add_section()
    console().print(table)
    for name, rows in found.items():
        claimed = [row["speedup"] for row in rows if row["processors"] in CLAIMED]
        if claimed:
            print(f"{name}: mean {statistics.fmean(claimed):.2f}, most {max(claimed):.2f} with 7 to 9 processors")
    save(options.json, results=found)


if __name__ == "__main__":
    main()
