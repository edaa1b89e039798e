"""Hooks of modules that layerpipe.split cuts through are called, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from layerpipe import split
from layerpipe.errors import SpecializationError
from tests.cases.split_models import Blocks, X, drawn_alike
from tests.engine.models import through


def hook(*_: Any) -> None:
    pass


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(hook),
    "forward, first": lambda m: m.register_forward_pre_hook(hook),
    "backward": lambda m: m.register_full_backward_hook(hook),
    "backward, first": lambda m: m.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_a_hook_on_what_the_cut_goes_through_is_refused_after_the_split(kind: str) -> None:
    model = Blocks()
    stages = split(model, 2, (X,))
    for module, name in ((model.blocks[3], "blocks.3"), (model, "Blocks")):
        handle = REGISTER[kind](module)
        with pytest.raises(SpecializationError, match=f"a hook was registered on {name} after layerpipe.split"):
            through(stages, X)
        handle.remove()
        through(stages, X)


@pytest.mark.parametrize("kind", REGISTER)
def test_a_hook_from_before_the_split_keeps_its_module_whole_and_is_called_while_it_is_there(kind: str) -> None:
    model, calls = Blocks(), list[str]()
    # By name, as the hook is a closure and not the function that REGISTER takes from this module.
    ways = {"forward": "forward_hook", "forward, first": "forward_pre_hook", "backward": "full_backward_hook",
            "backward, first": "full_backward_pre_hook"}  # fmt: skip
    handle = getattr(model.blocks[1], f"register_{ways[kind]}")(lambda *_: calls.append("seen"))
    stages = split(model, 2, (X,))
    calls.clear()
    through(stages, X.clone().requires_grad_()).sum().backward()
    assert calls == ["seen"]
    handle.remove()
    through(stages, X).sum().backward()
    assert calls == ["seen"]


def test_a_block_that_is_kept_whole_weighs_as_much_as_its_layers() -> None:
    cut, whole = Blocks(), Blocks()
    whole.blocks[1].register_forward_hook(hook)
    first, _ = split(whole, 2, (X,))
    assert first(X).shape == split(cut, 2, (X,))[0](X).shape == X.shape  # both are cut between two blocks


def test_a_hook_that_changes_the_output_does_so_until_it_is_removed() -> None:
    model = Blocks()
    handle = model.blocks[2].register_forward_hook(lambda m, i, o: o * 0.5)
    stages = split(model, 2, (X,))
    assert drawn_alike(model, stages, X)
    handle.remove()
    assert drawn_alike(model, stages, X)


def test_a_hook_on_the_model_itself_is_refused_with_the_way_out() -> None:
    model = Blocks()
    model.register_forward_hook(hook)
    with pytest.raises(ValueError, match="Blocks has a hook of its own, which no stage would call"):
        split(model, 2, (X,))


def test_a_hook_on_all_that_could_be_cut_is_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    model[0].register_forward_hook(hook)
    with pytest.raises(ValueError, match="0 is not taken apart for its hooks"):
        split(model, 2, (X,))
