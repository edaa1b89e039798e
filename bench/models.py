"""Which public models ``layerpipe.split`` cuts, and whether a training step of the stages is the model's own.

    pip install torchvision timm transformers    # whichever are there are tried
    python -m bench.models
    python -m bench.models transformers/llama timm/convnext_atto

Every model is cut into stages by FLOPs and trained for one minibatch without a delay, beside the same model whole:
loss, weights and buffers are compared, and the names must be the model's own. *Rounding* is a difference of at most a
ten-thousandth of a tensor's largest value, or 1e-7: gradients that cross in another memory layout are summed in another
order. Random layers are switched off (their numbers come from a generator of each stage's own). Weights are random;
transformers are small ones of each architecture.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import layerpipe
import layerpipe_kernels
from bench.report import console, save

VOCABULARY, CLASSES = 128, 10
LARGEST = 60e6  # parameters of a model that is tried


class Candidate(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]


class Logits(nn.Module):
    """The tensor of a transformers model's output that a loss wants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.config.use_cache = False  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())


def images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def classes() -> Tensor:
    return torch.randint(CLASSES, (2,))


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 16))


def torchvision_models() -> Iterator[tuple[str, Candidate]]:
    """All classifiers that are not too large."""
    from torchvision import models

    for name in models.list_models(module=models):
        options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
        if name in ("googlenet", "inception_v3"):
            options |= {"aux_logits": False, "init_weights": False}
        size = 299 if name == "inception_v3" else 224 if name.startswith(("vit", "maxvit")) else 96
        make = lambda name=name, options=options: models.get_model(name, **options)
        if models.get_model_weights(name).DEFAULT.meta["num_params"] <= LARGEST:
            yield name, Candidate(make, images(size), classes)


def timm_models() -> Iterator[tuple[str, Candidate]]:
    """One of each of some families."""
    import timm

    for name in (
        "cait_xxs24_224", "coat_lite_tiny", "convnext_atto", "crossvit_tiny_240", "davit_tiny", "deit_tiny_patch16_224",
        "dla34", "edgenext_xx_small", "efficientformer_l1", "efficientnet_lite0", "eva02_tiny_patch14_224",
        "fastvit_t8", "gcvit_xxtiny", "ghostnet_050", "hrnet_w18_small", "levit_128s", "mixer_s16_224",
        "mobilenetv3_small_050", "mobilevit_xxs", "nest_tiny", "poolformer_s12", "pvt_v2_b0", "regnetz_b16",
        "repvit_m1", "resmlp_12_224", "resnet18d", "rexnet_100", "tiny_vit_5m_224", "vit_tiny_patch16_224",
        "xcit_tiny_12_p16_224",
    ):  # fmt: skip
        size = timm.get_pretrained_cfg(name).input_size[-1]
        yield name, Candidate(lambda name=name: timm.create_model(name, num_classes=CLASSES), images(size), classes)


def transformers_models() -> Iterator[tuple[str, Candidate]]:
    import transformers as t

    t.logging.set_verbosity_error()
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    length = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    usual = {**size, **length, "intermediate_size": 64, "tie_word_embeddings": False}
    grouped = {**usual, "num_key_value_heads": 1}
    encoder = {**usual, "num_labels": CLASSES}
    language: dict[str, Callable[[], nn.Module]] = {
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**grouped, head_dim=16)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=4, n_head=2, tie_word_embeddings=False
            )
        ),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**usual)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**grouped)),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(
                vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=4, tie_word_embeddings=False
            )
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**grouped, sliding_window=8)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**grouped, num_local_experts=2)),
        "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**grouped)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**size, **length, ffn_dim=64, word_embed_proj_dim=32, tie_word_embeddings=False)
        ),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**grouped, pad_token_id=0)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=16)),
    }
    for name, make in language.items():
        yield name, Candidate(lambda make=make: Logits(make()), tokens, tokens)
    classifiers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**encoder)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**length, dim=32, hidden_dim=64, n_layers=4, n_heads=2, num_labels=CLASSES)
        ),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**encoder)),
    }
    for name, make in classifiers.items():
        yield name, Candidate(lambda make=make: Logits(make()), tokens, classes)
    vit = lambda: t.ViTForImageClassification(
        t.ViTConfig(**size, intermediate_size=64, image_size=32, patch_size=8, num_labels=CLASSES)
    )
    yield "vit", Candidate(lambda: Logits(vit()), images(32), classes)


LIBRARIES = {"torchvision": torchvision_models, "timm": timm_models, "transformers": transformers_models}


def without_chance(model: nn.Module) -> nn.Module:
    """Random layers do nothing: those of torch and of the three libraries."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def tried(candidate: Candidate, stages: int) -> str:
    """``"same bits"``, ``"rounding"``, what differs, or why there was nothing to compare."""
    torch.manual_seed(0)
    model = without_chance(candidate.make().train())
    x, y = candidate.inputs(), candidate.targets()
    whole = copy.deepcopy(model)
    try:
        parts = layerpipe.split(model, stages, (x,))
    except ValueError as error:
        return str(error)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.01, momentum=0.9, foreach=False)
    loss = loss_fn(whole(x), y)
    loss.backward()
    optimizer.step()
    sgd = lambda params, **past: layerpipe_kernels.SGD(params, lr=0.01, momentum=0.9, **past)
    with layerpipe.Pipeline(parts, loss_fn, sgd, schedule="sequential") as pipe:
        ours: Any = pipe.step(x, y)
        state = pipe.state_dict()
    expected = whole.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        return "left out: " + ", ".join(missing[:3])
    pairs = {name: (value, expected[name]) for name, value in state.items()} | {"the loss": (ours, loss.detach())}
    if all(torch.equal(a, b) for a, b in pairs.values()):
        return "same bits"
    wrong = [name for name, (a, b) in pairs.items() if (a - b).abs().max() > 1e-4 * b.abs().max() + 1e-7]
    return f"another {', '.join(wrong[:3])}" if wrong else "rounding"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="LIBRARY/MODEL", help="default: all")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    candidates: dict[str, Candidate] = {}
    for library, models in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed")
        elif not given.models or any(name.startswith(f"{library}/") for name in given.models):
            candidates |= {f"{library}/{name}": candidate for name, candidate in models()}
    if unknown := set(given.models) - candidates.keys():
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(candidates)}")
    results, seconds = dict[str, str](), dict[str, float]()
    for name in track(given.models or list(candidates), description="models", transient=True):
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results[name] = tried(candidates[name], given.stages)
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
        seconds[name] = time.perf_counter() - began
        save(given.json, stages=given.stages, results=results)  # after each, for whoever stops it here
    table = Table("model", "a step", "seconds", title=f"Cut into {given.stages} stages", title_justify="left")
    for name, result in results.items():
        table.add_row(name, result, f"{seconds[name]:.1f}")
    console().print(table)
    counts = {kind: sum(result == kind for result in results.values()) for kind in ("same bits", "rounding")}
    print(f"of {len(results)}: {counts['same bits']} the same bit for bit, {counts['rounding']} up to rounding")


if __name__ == "__main__":
    main()
