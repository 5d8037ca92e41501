"""The streamed decoder, and attention in canonical form, against the stock models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from convert.calibrate import Calibration
from convert.checkpoint.reader import Checkpoint
from convert.decoder import Decoder
from convert.facts import ModelFacts
from convert.families import tensor_names, unpack
from convert.hub import fetch_source
from convert.layer import AttentionLayer
from convert.methods.attention import keys, plane_order, queries, values
from convert.methods.fitting import head_outputs, projected
from convert.opening import open_model
from convert.streams import scoring_of
from tests.families.stock import attentions, make, random_ids
from tests.families.tiny import MODELS, attention, family, settings
from tests.helpers import assert_close, assert_equal, load_folder

_ALIBI = {"bloom", "mpt", "falcon"}  # calibration refuses them
NAMES = [name for name in MODELS if family(name) not in _ALIBI]
N, T = 2, 9
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 6,
    "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}
_THETA = {"rope_theta": 1e3}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": _LLAMA3 | _THETA}),
    "yarn": ("qwen2", {"rope_parameters": _YARN | _THETA}),
    "yarn-normed": ("qwen3", {"rope_parameters": _YARN | _THETA}),
    "yarn-interleaved": ("helium", {"rope_parameters": _YARN | _THETA}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0} | _THETA}),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0} | _THETA,
            "max_position_embeddings": 4,
        },
    ),
    # nine tokens are more than four, so that the factors for long texts are in use
    "longrope": (
        "phi3",
        {"rope_parameters": _LONG | _THETA, "original_max_position_embeddings": 4},
    ),
    "llama3-interleaved": ("cohere", {"rope_parameters": _LLAMA3 | _THETA}),
}


@dataclass(frozen=True, slots=True)
class Truth:
    """What a stock model did with some tokens; lists have an entry for each layer.

    Args:
        tokens: [N, T].
        hidden: [N, T, E] before each layer, and after the last.
        inputs: [N, T, E] of the attention.
        outputs: [N, T, E] of the attention.
        keys: [N, Hkv, T, D] that the cache took.
        values: [N, Hkv, T, Dv] likewise.
    """

    tokens: Tensor
    hidden: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


def _layers(model: Any) -> list[Any]:
    path, _, _ = attention(model.config.model_type).partition(".{layer}")
    return list(model.get_submodule(path))


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor.clone()


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.clone()


@torch.no_grad()
def _truth(model: Any) -> Truth:
    tokens = random_ids(model, T, batch=N)
    hidden: list[Tensor] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for layer, attending in zip(_layers(model), attentions(model), strict=True):
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: hidden.append(_given(args, kwargs)), with_kwargs=True
            ),
            attending.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append(_given(args, kwargs)), with_kwargs=True
            ),
            attending.register_forward_hook(lambda *given: outputs.append(_first(given[-1]))),
        ]
    last = _layers(model)[-1]
    handles.append(last.register_forward_hook(lambda *given: hidden.append(_first(given[-1]))))
    past = DynamicCache()  # without a config: windows drop nothing from it
    model(tokens, past_key_values=past, use_cache=True)
    for handle in handles:
        handle.remove()
    cached = past.layers
    return Truth(
        tokens, hidden, inputs, outputs, [c.keys for c in cached], [c.values for c in cached]
    )


@dataclass(frozen=True, slots=True)
class Source:
    """A saved stock model, and what it did."""

    folder: Path
    model: Any
    truth: Truth


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """A model of ``MODELS`` or ``SCALED``, by name."""

    @cache
    def made(name: str) -> Source:
        of_family, changed = SCALED.get(name, (name, {}))
        model = make(of_family, {**settings(of_family), **changed})
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        # the attention that is written out in each class; fused ones may leave out what it has
        model.set_attn_implementation("eager")
        return Source(folder, model, _truth(model))

    return made


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Checkpoint, ModelFacts, Decoder]]:
    with open_model(fetch_source(str(folder))) as model:
        decoder = Decoder(model.checkpoint, model.facts, context=T, device="cpu")
        yield model.checkpoint, model.facts, decoder


def _assert_same(found: Tensor, expected: Tensor) -> None:
    """Both are float32, summed in another order: windows run one by one here, in a batch there.

    A layer of these sizes makes relative errors of a few 2^-24 = 6e-8, and they grow with depth.
    """
    assert_close(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*NAMES, *SCALED])
def test_layers_one_by_one_are_the_stock_model(name: str, source: Callable[[str], Source]) -> None:
    made = source(name)
    truth = made.truth
    with _opened(made.folder) as (_, facts, decoder):
        hidden = decoder.embed(truth.tokens)
        _assert_same(hidden, truth.hidden[0])
        for layer in range(facts.layers):
            with decoder.block(layer) as block:
                after, inputs, outputs = block.run_all(hidden)
                assert_equal(block.attention_inputs(hidden), inputs)
                assert_equal(block.run_all_with(hidden, outputs), after)
                assert not [part for part in block.module.modules() if "forward" in vars(part)]
            assert all(weight.is_meta for weight in block.module.parameters())
            _assert_same(inputs, truth.inputs[layer])
            _assert_same(outputs, truth.outputs[layer])
            _assert_same(after, truth.hidden[layer + 1])
            hidden = after


@pytest.mark.parametrize("name", [*NAMES, *SCALED])
def test_canonical_attention_is_that_of_the_stock_model(
    name: str, source: Callable[[str], Source]
) -> None:
    """Rotated keys, values and outcomes: rotation, norms, clamps, scale, cap and windows in use."""
    made = source(name)
    truth = made.truth
    with _opened(made.folder) as (checkpoint, facts, decoder):
        decoder.embed(truth.tokens)
        calibration = _calibration(facts, truth.tokens)
        for layer in range(facts.layers):
            original = _canonical(checkpoint, facts, layer)
            ready = calibration.ready(original)
            scoring = scoring_of(facts, layer, decoder, truth.tokens.shape[1])
            order, inputs = plane_order(original), truth.inputs[layer]
            key, value = keys(ready, scoring, inputs), values(ready, scoring, inputs)
            _assert_same(key, truth.keys[layer][..., order])
            _assert_same(value, truth.values[layer])
            outcome = projected(
                ready, head_outputs(queries(ready, scoring, inputs), scoring, (key, value))
            )
            _assert_same(outcome, truth.outputs[layer])
            restored = calibration.stored(ready, like=original)
            for field in dataclasses.fields(original):
                tensor = getattr(original, field.name)
                if isinstance(tensor, Tensor):
                    assert_equal(getattr(restored, field.name), tensor)


def _canonical(checkpoint: Checkpoint, facts: ModelFacts, layer: int) -> AttentionLayer:
    parts = frozenset({"q", "k", "v", "o", "q_norm", "k_norm"})
    names = tensor_names(facts.family, facts.geometry, layer, parts)
    tensors = {name: checkpoint.read(name) for name in names if name in checkpoint.tensors}
    return unpack(tensors, facts.family, facts.geometry, layer, rope=facts.ropes[layer])


def _calibration(facts: ModelFacts, tokens: Tensor) -> Calibration:
    """One that can say how layers score; nothing else of a plan is needed for that."""
    plan: Any = SimpleNamespace(facts=facts)
    nothing: Any = None
    return Calibration(
        plan=plan,
        checkpoint=nothing,
        scratch=nothing,
        tokens=tokens,
        refit_scores=False,
        refit_output=False,
        seed=0,
        device="cpu",
    )


@pytest.mark.parametrize("name", sorted({family(name) for name in NAMES}))
@torch.no_grad()
def test_other_attention_outputs_go_where_the_stock_layer_takes_them(
    name: str, source: Callable[[str], Source]
) -> None:
    made = source(name)
    wanted = torch.randn(N, T, 1, generator=torch.Generator().manual_seed(3))
    outputs = [wanted * output.flip(-1) for output in made.truth.outputs]
    handles = [
        module.register_forward_hook(
            lambda _, __, given, new=new: (new, *given[1:]) if isinstance(given, tuple) else new
        )
        for module, new in zip(attentions(made.model), outputs, strict=True)
    ]
    seen: list[Tensor] = []
    handles += [
        layer.register_forward_hook(lambda *given: seen.append(_first(given[-1])))
        for layer in _layers(made.model)
    ]
    made.model(made.truth.tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    with _opened(made.folder) as (_, facts, decoder):
        hidden = decoder.embed(made.truth.tokens)
        for layer in range(facts.layers):
            with decoder.block(layer) as block:
                hidden = block.run_all_with(hidden, outputs[layer])
            _assert_same(hidden, seen[layer])


@pytest.mark.parametrize("name", [*NAMES, *SCALED])
def test_rotation_is_that_of_the_config_where_nothing_scales_it(
    name: str, source: Callable[[str], Source]
) -> None:
    made = source(name)
    with _opened(made.folder) as (_, facts, decoder):
        decoder.embed(made.truth.tokens)
        for layer, rope in enumerate(facts.ropes):
            angles = torch.tensor(
                [
                    [
                        token * rope.theta ** (-2 * plane / rope.dim)
                        for plane in range(rope.dim // 2)
                    ]
                    for token in range(T)
                ]
            )
            unscaled = torch.polar(torch.ones_like(angles), angles)
            turn = decoder.turn(layer)
            assert turn.shape == unscaled.shape
            # angles are up to 8 and have the rounding of float32
            same = torch.allclose(turn, unscaled, rtol=0, atol=1e-5)
            assert same == (rope.kind == "default" or not rope.dim)


def test_checkpoints_in_16_bits_run_in_float32(tmp_path: Path) -> None:
    make("llama", settings("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    truth = _truth(load_folder(tmp_path, torch.float32))
    with _opened(tmp_path) as (_, _, decoder):
        hidden = decoder.embed(truth.tokens)
        for layer in range(2):
            with decoder.block(layer) as block:
                hidden = block.run_all(hidden)[0]
        _assert_same(hidden, truth.hidden[-1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_checkpoints_without_the_prefix_of_the_base_model_run(name: str, tmp_path: Path) -> None:
    model = make(name, settings(name))
    truth = _truth(model)
    model.save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", f"{model.base_model_prefix}."
    bare = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    with _opened(tmp_path) as (_, _, decoder):
        hidden = decoder.embed(truth.tokens)
        for layer in range(2):
            with decoder.block(layer) as block:
                hidden = block.run_all(hidden)[0]
        _assert_same(hidden, truth.hidden[-1])
