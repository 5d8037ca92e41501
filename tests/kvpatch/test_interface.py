"""The attention function by itself: what it takes, what it leaves to torch, and that it says so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GptOssConfig,
    T5Config,
    T5Model,
)
from transformers.models.llama import modeling_llama

import kvpatch
from kvpatch.attention import interface
from kvpatch.attention.interface import attention_forward
from kvpatch.errors import UsageError
from kvpatch.kernels.reference import causal_span
from kvpatch.models.scores_kvpatch import alibi_slopes
from tests.families.stock import Float64, make, random_ids
from tests.families.tiny import settings
from tests.helpers import assert_close
from tests.kvpatch.reference_ops import use_reference_ops
from tests.kvpatch.stock_latents import stock_model

BATCH, HEADS, KV_HEADS, TOKENS, WIDTH = 2, 4, 2, 6, 8


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return use_reference_ops(monkeypatch)


@pytest.fixture(autouse=True)
def _say_again() -> None:
    interface._say.cache_clear()


class Module(nn.Module):
    """As much of an attention module as attention functions look at."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


# the reference written out needs to find the function of a file, as that of a model has one
Module.__module__ = modeling_llama.__name__


def _operands(tokens: int = TOKENS, keys: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(BATCH, heads, length, WIDTH, generator=generator, dtype=torch.float64)
        for heads, length in ((HEADS, tokens), (KV_HEADS, keys), (KV_HEADS, keys))
    )


def _truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, mask, **how)
    return output.transpose(1, 2)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("tokens", "keys", "is_causal"),
    [(6, 6, None), (6, 9, None), (1, 9, None), (6, 9, False), (6, 6, False)],
)
def test_no_mask_means_what_it_means_to_sdpa(
    kernels: bool,
    tokens: int,
    keys: int,
    is_causal: bool | None,
    request: pytest.FixtureRequest,
) -> None:
    if kernels:
        request.getfixturevalue("ops")
    query, key, value = _operands(tokens, keys)
    found, _ = attention_forward(Module(), query, key, value, None, is_causal=is_causal)
    if is_causal is None and tokens > 1:
        wanted = _truth(query, key[:, :, :tokens], value[:, :, :tokens], None, is_causal=True)
    else:
        wanted = _truth(query, key, value, None)
    assert_close(found, wanted, atol=1e-10)


@pytest.mark.parametrize("kernels", [True, False])
def test_documents_of_a_packed_sequence(kernels: bool, request: pytest.FixtureRequest) -> None:
    if kernels:
        request.getfixturevalue("ops")
    query, key, value = (t[:1] for t in _operands())
    bounds = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    number = torch.tensor([0, 0, 1, 2, 2, 2])
    seen = (number[:, None] == number) & torch.ones(6, 6).tril().bool()
    wanted = _truth(query, key, value, seen)
    dense = torch.ones(1, 1, 6, 6).tril().bool()
    for mask in (None, causal_span(1, 6, 6)[:, None], dense, (1.0 - dense.double()) * -1e300):
        found, _ = attention_forward(Module(), query, key, value, mask, cu_seq_lens_q=bounds)
        assert_close(found, wanted, atol=1e-10)
    with pytest.raises(UsageError, match="2 sequences of 6 queries"):
        attention_forward(Module(), *_operands(), None, cu_seq_lens_q=bounds)


@pytest.mark.parametrize("kernels", [True, False])
def test_tokens_after_the_last_document_are_one_more(
    kernels: bool, request: pytest.FixtureRequest
) -> None:
    """As where a sequence is padded to a multiple; no index may be out of bounds on a device."""
    if kernels:
        request.getfixturevalue("ops")
    query, key, value = (t[:1] for t in _operands())
    number = torch.tensor([0, 0, 1, 1, 2, 2])
    wanted = _truth(query, key, value, (number[:, None] == number).tril())
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    found, _ = attention_forward(Module(), query, key, value, None, cu_seq_lens_q=bounds)
    assert_close(found, wanted, atol=1e-10)


def test_spans_are_the_same_mask_in_torch() -> None:
    query, key, value = _operands(4, 9)
    span = causal_span(BATCH, 4, 9, window=5)
    seen = torch.ones(4, 9).tril(5).triu(1).bool()
    found, _ = attention_forward(Module(), query, key, value, span[:, None])
    assert_close(found, _truth(query, key, value, seen), atol=1e-10)
    slopes = alibi_slopes(HEADS, query.device)
    bias = slopes[:, None, None] * torch.arange(9)
    found, _ = attention_forward(Module(), query, key, value, span[:, None], slopes=slopes)
    bias = bias.double().masked_fill(~seen, -torch.inf)
    assert_close(found, _truth(query, key, value, bias), atol=1e-6)  # slopes are in float32


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"dropout": 0.5}, "it drops attention weights"),
        ({"output_attentions": True}, "it is asked for its weights"),
        ({"position_bias": torch.zeros(1, HEADS, TOKENS, TOKENS)}, "it adds a bias to the scores"),
        ({"s_aux": torch.zeros(HEADS)}, "it has attention sinks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_kernels_cannot_do_torch_does_and_says_so_once(
    asked: dict[str, Any], why: str, ops: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    operands = _operands()
    span = causal_span(BATCH, TOKENS, TOKENS)[:, None]
    wanted = _truth(*operands, None, is_causal=True)
    with caplog.at_level(logging.WARNING, "kvpatch"):
        for _ in range(2):
            found, weights = attention_forward(Module().eval(), *operands, span, **asked)
    assert [record.message for record in caplog.records] == [
        f"kvpatch_triton computes in torch: {why}"
    ]
    assert not ops
    if "dropout" not in asked:
        assert_close(found, wanted, atol=1e-6 if "output_attentions" not in asked else 1e-10)
    if "output_attentions" in asked:
        assert weights is not None
        assert weights.shape == (BATCH, HEADS, TOKENS, TOKENS)
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-10)


def test_dense_masks_are_left_to_torch(ops: list[str], caplog: pytest.LogCaptureFixture) -> None:
    operands = _operands()
    mask = torch.rand(BATCH, 1, TOKENS, TOKENS) > 0.3
    mask |= torch.eye(TOKENS, dtype=torch.bool)
    found, _ = attention_forward(Module(), *operands, mask)
    assert_close(found, _truth(*operands, mask), atol=1e-10)
    assert not ops
    assert "its mask cannot be said in spans" in caplog.text


def test_a_paged_cache_is_refused() -> None:
    with pytest.raises(UsageError, match="paged cache"):
        attention_forward(Module(), *_operands(), None, cache=object())


def test_autocast_gives_operands_one_dtype(ops: list[str]) -> None:
    query, key, value = (t.float() for t in _operands())
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention_forward(Module(), query, key.bfloat16(), value.bfloat16(), None)
    assert found.dtype == torch.bfloat16
    rounded = (t.bfloat16().double() for t in (query, key, value))
    wanted = _truth(*rounded, None, is_causal=True)
    assert_close(found.double(), wanted, atol=2**-7)  # half a unit of what is below 4


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 20])
def test_slopes_are_those_of_the_stock_models(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    found = alibi_slopes(heads, torch.device("cpu"))
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    mpt = build_mpt_alibi_tensor(heads, 2)
    assert_close(found, bloom[:, 0, 1], atol=1e-7)
    assert_close(found, -mpt[:, 0, 0], atol=1e-7)


@torch.no_grad()
def test_encoders_see_both_sides(ops: list[str]) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    model = BertModel(BertConfig(**sizes, num_attention_heads=4)).eval().double()
    ids = random_ids(model, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    wanted = [model(ids, attention_mask=m).last_hidden_state for m in (mask, None)]
    kvpatch.patch(model, strict=True)
    found = [model(ids, attention_mask=m).last_hidden_state for m in (mask, None)]
    assert_close(found[0][mask.bool()], wanted[0][mask.bool()], atol=1e-10)
    assert_close(found[1], wanted[1], atol=1e-10)
    assert set(ops) == {"flash"}


@torch.no_grad()
def test_biases_and_cross_attention_of_t5_are_as_before(ops: list[str]) -> None:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2}
    model = T5Model(T5Config(**sizes, num_heads=4)).eval().double()
    ids = random_ids(model, TOKENS)
    wanted = model(ids, decoder_input_ids=ids[:, :4]).last_hidden_state
    kvpatch.patch(model)
    found = model(ids, decoder_input_ids=ids[:, :4]).last_hidden_state
    assert_close(found, wanted, atol=1e-5)


@torch.no_grad()
def test_attention_sinks_are_left_to_the_model(ops: list[str]) -> None:
    sizes = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 16}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    config = GptOssConfig(
        **sizes, vocab_size=97, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.normal_()
    ids = random_ids(model, TOKENS)
    wanted = model(ids).logits
    report = kvpatch.patch(model)
    assert "it has attention sinks" in str(report)
    assert_close(model(ids).logits, wanted, atol=1e-5)
    assert not ops


def test_the_name_is_known_when_a_model_is_loaded(ops: list[str], tmp_path: Any) -> None:
    model = make("qwen2", settings("qwen2"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="kvpatch_triton")
    ids = random_ids(model)
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert ops == ["flash"] * 2
    assert "kvpatch_triton" not in (tmp_path / "config.json").read_text()
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again")._attn_implementation is None
    model.set_attn_implementation("kvpatch_triton")
    model(ids)
    assert len(ops) == 4


def _gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(~mask.bool(), -100)
    model.train()
    model(ids, labels=labels, attention_mask=mask, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neo", "youtu"])
def test_gradients_are_those_of_the_unpatched_model(
    name: str, checkpointing: bool, ops: list[str]
) -> None:
    model = stock_model(name) if name == "youtu" else make(name, settings(name)).double()
    if name in {"llama", "youtu"}:
        model.set_attn_implementation("sdpa")  # which has no softmax in float32
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.0
    ids = random_ids(model)
    ours = copy.deepcopy(model)
    kvpatch.patch(ours, strict=True)
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = _gradients(model, ids)
    found = _gradients(ours, ids)
    assert found.keys() == wanted.keys()
    # bloom and gpt_neo have a softmax in float32
    atol = 1e-10 if name in {"llama", "youtu"} else 1e-6
    for key, gradient in wanted.items():
        assert_close(found[key], gradient, atol=atol)
    assert set(ops) == {"flash"}
    assert len(ops) == 2 * (1 + checkpointing)


@pytest.mark.parametrize("name", ["llama", "youtu"])
def test_adapters_train_as_in_the_unpatched_model(name: str, ops: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = stock_model(name) if name == "youtu" else make(name, settings(name)).double()
    model.set_attn_implementation("sdpa")
    targets = ["o_proj", "kv_b_proj" if name == "youtu" else "k_proj"]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    )
    ours = copy.deepcopy(adapted)
    kvpatch.patch(ours)
    assert adapted.config._attn_implementation == "sdpa"
    ids = random_ids(model)
    wanted, found = _gradients(adapted, ids), _gradients(ours, ids)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert_close(found[key], gradient, atol=1e-10)
    assert set(ops) == {"flash"}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager")
    return compiled


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_function_compiles_into_one_graph() -> None:
    module = Module()
    span = causal_span(BATCH, TOKENS, TOKENS)[:, None]
    for mask in (span, None, torch.ones(1, 1, TOKENS, TOKENS).tril().bool()):
        run = _compiled(lambda q, k, v, m=mask: attention_forward(module, q, k, v, m)[0])
        operands = _operands()
        assert_close(run(*operands), _truth(*operands, None, is_causal=True), atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_graph_that_computes_in_torch_says_so_too(caplog: pytest.LogCaptureFixture) -> None:
    run = _compiled(lambda q, k, v: attention_forward(Module(), q, k, v, None)[0])
    with caplog.at_level(logging.WARNING, "kvpatch"):
        for _ in range(2):
            run(*_operands())
    assert [record.message for record in caplog.records] == [
        "kvpatch_triton computes in torch: its device is cpu, and kernels need cuda"
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_step_compiles_into_one_graph(ops: list[str]) -> None:
    model = make("llama", settings("llama")).double()
    ids = random_ids(model)
    mask = torch.ones_like(ids)
    with Float64(), torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
    kvpatch.patch(model, strict=True)
    run = _compiled(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits)
    assert_close(run(ids, mask), wanted, atol=1e-5)
    run(ids, mask).sum().backward()
    assert set(ops) == {"flash"}
