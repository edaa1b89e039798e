from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import networkx as nx
import pytest

from layerpipe.theory import retiming
from layerpipe.theory.retiming import Node, RetimingError, derive, registers, training_graph


def groupings(layers: int) -> Iterator[list[list[int]]]:
    """Every way to cut a chain into stages."""
    for cuts in itertools.product((False, True), repeat=layers - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), layers]
        yield [list(range(a, b)) for a, b in itertools.pairwise(edges)]


def singles(layers: int) -> list[list[int]]:
    return [[layer] for layer in range(layers)]


# -- the derivation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("layers", [*range(1, 11), *(pytest.param(n, marks=pytest.mark.slow) for n in (11, 12))])
def test_the_solver_finds_the_rule_for_every_grouping_of_a_chain(layers: int, schedule: str) -> None:
    factor = {"lockstep": 2, "1f1b": 1, "sequential": 0}[schedule]
    for grouping in groupings(layers) if layers < 9 or schedule == "lockstep" else [singles(layers)]:
        derivation = derive(layers, grouping, schedule)
        rule = {layer: factor * (len(grouping) - 1 - s) for s, stage in enumerate(grouping) for layer in stage}
        assert derivation.layer_delays == rule
        assert derivation.gradient_delays == rule


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_no_fewer_delayed_gradients_would_do(schedule: str) -> None:
    derivation = derive(5, singles(5), schedule)
    slow, lags = derivation.clocking.slow, derivation.lags
    for layer, count in derivation.gradient_delays.items():
        fewer = {a: slow * (n - (a == layer)) for a, n in derivation.gradient_delays.items()}
        if not count:
            continue
        graph = retiming.slow_down(derivation.sequential, slow)
        graph = retiming.delay_gradients(retiming.insert_cutset(graph, {Node("X")}, derivation.input_delay), fewer)
        with pytest.raises(RetimingError, match=f"W{layer} -> U{layer} would carry -{slow}"):
            retiming.retime(graph, lags)
        # The update cannot come later either: the forward would read weights that its own tick makes.
        assert registers(derivation.graph, Node("U", layer), Node("F", layer)) - slow < 1


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_retiming_keeps_the_registers_of_every_loop(schedule: str) -> None:
    derivation = derive(4, [[0, 1], [2], [3]], schedule)
    slow = derivation.clocking.slow
    for loop in nx.simple_cycles(derivation.sequential):
        edges = list(zip(loop, [*loop[1:], loop[0]], strict=True))
        before = slow * sum(registers(derivation.sequential, *e) for e in edges)
        added = sum(slow * derivation.gradient_delays[b.layer] for a, b in edges if (a.kind, b.kind) == ("W", "U"))
        assert sum(registers(derivation.graph, *e) for e in edges) == before + added


def test_each_boundary_carries_one_register_each_way() -> None:
    graph = derive(4, singles(4)).graph
    for s in range(3):
        assert registers(graph, Node("F", s), Node("F", s + 1)) == 1
        assert registers(graph, Node("B", s + 1), Node("B", s)) == 1
    assert retiming.latency(graph) == 3


def test_minibatches_in_flight() -> None:
    assert derive(4, singles(4), "lockstep").in_flight == [7, 5, 3, 1]
    assert derive(4, singles(4), "1f1b").in_flight == [4, 3, 2, 1]
    assert derive(4, singles(4), "sequential").in_flight == [1, 1, 1, 1]


def test_1f1b_gives_forward_and_backward_turns_on_one_processor() -> None:
    """Minibatches come every second tick; a stage's forwards fall on the ticks that its backwards leave free."""
    derivation = derive(5, [[0, 1], [2], [3, 4]], "1f1b")
    for layer in range(5):
        apart = derivation.lags[Node("B", layer)] - derivation.lags[Node("F", layer)]
        assert apart % derivation.clocking.slow == 1


def test_a_skip_connection_gets_a_register_at_every_boundary_it_crosses() -> None:
    layers = retiming.chain(6)
    layers.add_edges_from([(0, 4), (2, 3), (1, 5)])
    derivation = derive(layers, [[0], [1, 2], [3], [4, 5]])
    assert registers(derivation.graph, Node("F", 0), Node("F", 4)) == 3
    assert registers(derivation.graph, Node("B", 4), Node("B", 0)) == 3
    assert registers(derivation.graph, Node("F", 1), Node("F", 5)) == 2
    assert registers(derivation.graph, Node("F", 2), Node("F", 3)) == 1
    assert derivation.delays == [6, 4, 2, 0]


def test_parallel_branches_in_stages_of_their_own_keep_the_rule() -> None:
    layers = nx.DiGraph([("stem", "left"), ("stem", "right"), ("left", "join"), ("right", "join")])
    derivation = derive(layers, [["stem"], ["left"], ["right"], ["join"]])
    assert derivation.layer_delays == {"stem": 6, "left": 4, "right": 2, "join": 0}
    assert registers(derivation.graph, Node("F", "left"), Node("F", "join")) == 2


def test_the_derivation_is_a_series_of_checked_steps() -> None:
    derivation = derive(4, singles(4))
    last = derivation.steps[-1].graph
    assert nx.utils.graphs_equal(last, derivation.graph)
    lms = [step for step in derivation.steps if "delayed LMS" in step.title]
    assert len(lms) == 1
    assert {a.layer: new - old for (a, _), (old, new) in lms[0].changes.items()} == {0: 6, 1: 4, 2: 2}
    for step in derivation.steps:
        assert all(data["registers"] >= 0 for _, _, data in step.graph.edges(data=True))
    text = str(derivation)
    assert "W0→U0 0→6" in text
    assert "U1→B1 5: 4 updates old" in text


# -- what it computes ----------------------------------------------------------------------------------------------


def scalar_network(layers: int) -> tuple[dict[Node, Any], dict[Node, float]]:
    """One number per layer: ``F_l = tanh(w_l F_(l-1))``, squared error, gradient descent."""
    operations: dict[Node, Any] = {}

    def layer(i: int) -> None:
        f, b, g, w = (Node(kind, i) for kind in "FBWU")
        source = Node("F", i - 1) if i else Node("X")
        above = Node("B", i + 1) if i + 1 < layers else Node("L")
        entering = lambda v: v[source][0] if not i else v[source]
        arriving = lambda v: v[above][1] if above.kind == "L" else v[above]
        operations[f] = lambda v: math.tanh(v[w] * entering(v))
        operations[b] = lambda v: v[w] * arriving(v) * (1 - v[f] ** 2)
        operations[g] = lambda v: entering(v) * arriving(v) * (1 - v[f] ** 2)
        operations[w] = lambda v: v[w] - 0.05 * v[g]

    for i in range(layers):
        layer(i)
    last = Node("F", layers - 1)
    operations[Node("L")] = lambda v: ((v[last] - v[Node("X")][1]) ** 2, 2 * (v[last] - v[Node("X")][1]))
    operations[Node("Y")] = lambda v: v[Node("L")][0]
    return operations, {Node("U", i): 0.5 + 0.1 * i for i in range(layers)}


def losses(graph: nx.DiGraph, layers: int, *, count: int = 30, slow: int = 1) -> list[float]:
    operations, weights = scalar_network(layers)
    data = [(math.sin(1 + m), math.cos(2 * m)) for m in range(count)]
    ticks = [x for pair in data for x in (pair, *[None] * (slow - 1))]
    out = retiming.run(graph, operations, weights, [*ticks, *[None] * retiming.latency(graph)])
    return [y for y in out if y is not None]


def delayed_descent(layers: int, delays: Mapping[int, int], count: int = 30, accumulate: int = 1) -> list[float]:
    """Training with late gradients, written as a loop: weights as stashed, gradients wait in a list."""
    weights = [0.5 + 0.1 * i for i in range(layers)]
    waiting: list[list[float]] = []
    added: list[list[float]] = [[] for _ in range(layers)]
    out = []
    for m in range(count):
        x, target = math.sin(1 + m), math.cos(2 * m)
        activations = [x]
        for w in weights:
            activations.append(math.tanh(w * activations[-1]))
        out.append((activations[-1] - target) ** 2)
        above, gradients = 2 * (activations[-1] - target), [0.0] * layers
        for i in reversed(range(layers)):
            slope = 1 - activations[i + 1] ** 2
            gradients[i], above = activations[i] * above * slope, weights[i] * above * slope
        waiting.append(gradients)
        for i in range(layers):
            if m >= delays[i]:
                added[i].append(waiting[m - delays[i]][i])
                if len(added[i]) == accumulate:
                    weights[i] -= 0.05 * (sum(added[i]) / accumulate)
                    added[i] = []
    return out


def test_the_sequential_graph_is_gradient_descent() -> None:
    assert losses(training_graph(4), 4) == delayed_descent(4, dict.fromkeys(range(4), 0))


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("grouping", [singles(4), [[0, 1], [2, 3]], [[0], [1, 2, 3]]])
def test_the_pipeline_is_gradient_descent_with_late_gradients(schedule: str, grouping: list[list[int]]) -> None:
    derivation = derive(4, grouping, schedule)
    expected = delayed_descent(4, derivation.layer_delays)
    assert losses(derivation.graph, 4, slow=derivation.clocking.slow) == expected


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_with_accumulation_too(schedule: str, accumulate: int) -> None:
    derivation = derive(4, singles(4), schedule, accumulate)
    assert nx.utils.graphs_equal(derivation.steps[-1].graph, derivation.graph)
    lags = derive(4, singles(4), schedule).layer_delays
    assert derivation.layer_lags == lags
    assert derivation.delays == [-(-lag // accumulate) for lag in lags.values()]
    assert retiming.delays(4, schedule, accumulate) == derivation.delays
    expected = delayed_descent(4, lags, accumulate=accumulate)
    assert losses(derivation.graph, 4, slow=derivation.clocking.slow) == expected
    assert expected != delayed_descent(4, lags)


def test_accumulation_is_a_step_of_its_own() -> None:
    text = str(derive(4, singles(4), "lockstep", 4))
    assert "accumulation: each update loop makes one update in 4 minibatches, with the mean of their gradients" in text
    assert "U0→B0 7: 6 minibatches, 1 or 2 updates old" in text
    assert "U1→B1 5: 4 minibatches, 1 updates old" in text
    with pytest.raises(ValueError, match="an update takes the gradients of at least 1 minibatch, got 0"):
        derive(4, singles(4), "lockstep", 0)


def test_retiming_changes_no_output() -> None:
    derivation = derive(5, singles(5))
    late = next(step.graph for step in derivation.steps if "delayed LMS" in step.title)
    assert losses(late, 5) == losses(derivation.graph, 5)
    assert losses(late, 5) != losses(derivation.sequential, 5)


@pytest.mark.parametrize("count", [1, 3])
def test_cutset_delays_alone_only_add_latency(count: int) -> None:
    sequential = training_graph(4)
    later = retiming.insert_cutset(sequential, set(sequential) - {Node("Y")}, 1)
    later = retiming.insert_cutset(later, {Node("X")}, count)
    assert retiming.latency(later) == count + 1
    assert losses(later, 4) == losses(sequential, 4)


def test_the_forward_alone_can_be_pipelined_by_cutsets() -> None:
    """Without a backward every boundary is a feed-forward cutset."""
    whole = training_graph(4)
    forward = whole.subgraph([n for n in whole if n.kind in "XFLY"]).copy()
    piped = forward
    for s in range(3):
        piped = retiming.insert_cutset(piped, {Node("X"), *(Node("F", i) for i in range(s + 1))})
    weights = {Node("U", i): 0.5 for i in range(4)}
    operations, _ = scalar_network(4)
    held = {n: (lambda v, op=op, n=n: op({**v, **weights})) for n, op in operations.items()}
    ticks = [(float(m), 0.0) for m in range(9)] + [None] * 3
    a, b = (retiming.run(graph, held, {}, ticks) for graph in (forward, piped))
    assert retiming.latency(piped) == 3
    assert b[:3] == [None] * 3
    assert a[:9] == b[3:]


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_cut_through_the_training_loop_is_refused_and_names_the_edge() -> None:
    graph = training_graph(4)
    before = {Node("X"), *(Node(kind, i) for kind in "FBWU" for i in range(2))}
    with pytest.raises(RetimingError, match="B2 -> B1 crosses it backwards") as refused:
        retiming.insert_cutset(graph, before)
    assert refused.value.edge == (Node("B", 2), Node("B", 1))


def test_an_illegal_retiming_is_refused_and_names_the_edge() -> None:
    with pytest.raises(RetimingError, match="F0 -> B0 would carry -1 registers"):
        retiming.retime_cutset(training_graph(2), {Node("F", 0), Node("U", 0)})
    with pytest.raises(RetimingError, match="L -> B2 would carry -1"):  # without delayed LMS there is nothing to move
        retiming.retime_cutset(training_graph(3), {Node("L"), Node("Y"), *(Node("F", i) for i in range(3))}, 1)


def test_stages_against_the_flow_are_refused_and_name_the_edge() -> None:
    layers = retiming.chain(["a", "b", "c"])
    with pytest.raises(RetimingError, match=r"F\(a\) -> F\(b\) runs from stage 1 back to stage 0"):
        derive(layers, [["b", "c"], ["a"]])


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ([[0, 1]], "in no stage: 2"),
        ([[0, 1], [1, 2]], "more than one place: 1"),
        ([[0, 1], [2, 3]], "has not: 3"),
        ([[0, 1, 2], []], "empty stages: stage 1"),
    ],
)
def test_a_bad_grouping_is_refused(grouping: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derive(3, grouping)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        retiming.delays(0, "lockstep")
    with pytest.raises(ValueError, match="at least one layer"):
        training_graph(0)
    with pytest.raises(ValueError, match="circle: a -> b"):
        training_graph(nx.DiGraph([("a", "b"), ("b", "a")]))
    graph = training_graph(2)
    with pytest.raises(ValueError, match="no node F7"):
        retiming.retime(graph, {Node("F", 7): 1})
    with pytest.raises(ValueError, match="no layer 7"):
        retiming.delay_gradients(graph, {7: 1})
    for operation in (
        lambda: retiming.insert_cutset(graph, {Node("X")}, -1),
        lambda: retiming.delay_gradients(graph, {0: -1}),
        lambda: retiming.slow_down(graph, 0),
    ):
        with pytest.raises(ValueError):
            operation()


# -- the clock -----------------------------------------------------------------------------------------------------


def test_the_training_loop_bounds_the_clock_until_gradients_may_be_late() -> None:
    graph = training_graph(4)
    whole = 4 + 3 + 1  # four forwards, three activation gradients, a weight gradient
    assert retiming.clock_period(graph) == whole
    assert retiming.minimum_period(graph)[0] == whole
    assert retiming.minimum_period(graph, keep_latency=False)[0] == whole
    late = retiming.delay_gradients(graph, dict.fromkeys(range(4), 7))
    assert retiming.minimum_period(late, keep_latency=False)[0] == 1
    assert retiming.clock_period(derive(4, singles(4)).graph) == 2  # the last stage: forward, then backward


def test_the_lags_of_the_minimum_period_reach_it() -> None:
    layers = retiming.chain(5)
    for i, (forward, backward) in enumerate([(3, 4), (1, 1), (5, 2), (2, 2), (1, 6)]):
        layers.nodes[i].update(forward=forward, backward=backward, gradient=1)
    graph = retiming.delay_gradients(training_graph(layers), dict.fromkeys(range(5), 3))
    period, lags = retiming.minimum_period(graph, keep_latency=False)
    assert period < retiming.clock_period(graph)
    assert retiming.clock_period(retiming.retime(graph, lags)) == period


def test_the_textbook_correlator() -> None:
    """Leiserson and Saxe 1991, figure 1: period 24, retimed 13."""
    graph = nx.DiGraph()
    times = {"host": 0, "d1": 3, "d2": 3, "d3": 3, "d4": 3, "p1": 7, "p2": 7, "p3": 7}
    for name, time in times.items():
        graph.add_node(Node(name), time=time)
    edges = [("host", "d1", 1), ("d1", "d2", 1), ("d2", "d3", 1), ("d3", "d4", 1), ("d4", "p1", 0), ("p1", "p2", 0),
             ("p2", "p3", 0), ("p3", "host", 0), ("d3", "p1", 0), ("d2", "p2", 0), ("d1", "p3", 0)]  # fmt: skip
    for a, b, count in edges:
        graph.add_edge(Node(a), Node(b), registers=count)
    assert retiming.clock_period(graph) == 24
    period, lags = retiming.minimum_period(graph)
    assert period == 13
    assert retiming.clock_period(retiming.retime(graph, lags)) == 13


def test_a_loop_without_a_register_is_refused() -> None:
    graph = training_graph(1)
    graph.edges[Node("U", 0), Node("F", 0)]["registers"] = 0
    with pytest.raises(RetimingError, match=r"a loop without a register: .*F0"):
        retiming.clock_period(graph)


def test_schedules_without_registers_say_so() -> None:
    derivation = derive(3, singles(3), "sequential")
    assert dict(derivation.graph.edges) == dict(derivation.sequential.edges)
    assert (derivation.delays, derivation.input_delay, derivation.inserted) == ([0, 0, 0], 0, [0, 0, 0])
    assert "none is inserted" in str(derivation)
    assert "none is inserted" not in str(derive(3, singles(3)))
    with pytest.raises(ValueError, match="'gpipe' is not derived by retiming: it puts no register anywhere"):
        derive(3, singles(3), "gpipe")
    with pytest.raises(ValueError, match=r"'layerpipe' is not derived .* no stages to retime"):
        derive(3, singles(3), "layerpipe")
    with pytest.raises(ValueError, match="'other' is unknown; there are: sequential, lockstep, 1f1b"):
        derive(3, singles(3), "other")
