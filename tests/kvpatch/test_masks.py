"""Masks as spans, against the dense masks that transformers makes of the same description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    masking_utils,
    modeling_utils,
)

from kvpatch.attention.masks import span_mask
from kvpatch.kernels.reference import visible
from kvpatch.models.scores_kvpatch import packed_span, span_of
from tests.kvpatch.reference_ops import use_reference_ops

BATCH, TOKENS, KEYS = 2, 7, 12


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    use_reference_ops(monkeypatch)


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def _chunks(size: int) -> Any:
    return masking_utils.chunked_causal_mask_function(size, torch.tensor([0, 2]))


def _documents() -> Any:
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 3]])
    return masking_utils.packed_sequence_mask_function(numbers)


CAUSAL = masking_utils.causal_mask_function
# mask functions with the sizes and offsets that they come with
KNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "causal": (CAUSAL, {"kv_length": TOKENS}),
    "cached": (CAUSAL, {"q_offset": 5}),
    "static": (CAUSAL, {"q_offset": torch.tensor(3)}),
    "before any": (CAUSAL, {"q_offset": 0}),
    "forgotten": (CAUSAL, {"q_offset": 9, "kv_offset": 4}),
    "window": (masking_utils.sliding_window_causal_mask_function(3), {"q_offset": 5}),
    "rolled window": (
        masking_utils.sliding_window_causal_mask_function(5),
        {"q_offset": 20, "kv_offset": 16, "kv_length": 11},
    ),
    "chunks": (_chunks(3), {"q_offset": 5}),
    "chunks of a static cache": (_chunks(4), {"q_offset": torch.tensor(2)}),
    "all": (masking_utils.bidirectional_mask_function, {}),
    "window around": (
        masking_utils.sliding_window_bidirectional_mask_function(2),
        {"kv_length": TOKENS},
    ),
    "documents": (masking_utils.and_masks(CAUSAL, _documents()), {"kv_length": TOKENS}),
    "documents with windows": (
        masking_utils.and_masks(masking_utils.sliding_window_causal_mask_function(2), _documents()),
        {"kv_length": TOKENS},
    ),
}
PADDING: dict[str, Tensor | None] = {
    "none": None,
    "none of it": _mask("1" * KEYS, "1" * KEYS),
    "left": _mask("000011111111", "011111111111"),
    "right": _mask("111111110000", "111111111110"),
    "short": _mask("11111111", "01111111"),  # what a static cache has not written yet
    "both": _mask("001111100000", "111111111111"),
    "nothing else": _mask("000000000000", "000011111111"),
}


def _both(function: Any, padding: Tensor | None, **sizes: Any) -> tuple[Tensor, Tensor]:
    """Our mask and the stock one."""
    how = {"batch_size": BATCH, "q_length": TOKENS, "kv_length": KEYS, **sizes}
    how |= {"mask_function": function, "attention_mask": padding}
    stock = masking_utils.sdpa_mask(**how, allow_is_causal_skip=False)
    found = span_mask(**how)
    assert stock is not None
    assert found is not None
    return found, stock


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", KNOWN)
def test_spans_show_what_the_stock_mask_shows(name: str, padding: str) -> None:
    function, sizes = KNOWN[name]
    mask = PADDING[padding]
    if mask is not None and sizes.get("kv_offset"):  # it is as long as the sequence
        mask = torch.cat((mask, mask[:, -1:].expand(-1, sizes["kv_offset"])), 1)
    span, stock = _both(function, mask, **sizes)
    assert span.dtype == torch.int32
    assert span.shape == (BATCH, 1, TOKENS, 2)
    assert torch.equal(visible(span, stock.shape[-1]), stock)
    assert (span.diff(dim=2) >= 0).all()
    assert (span[..., 0] <= span[..., 1]).all()
    assert 0 <= span.min() <= span.max() <= stock.shape[-1]


@pytest.mark.parametrize(
    "inner",
    [CAUSAL, masking_utils.sliding_window_causal_mask_function(2)],
    ids=["causal", "window"],
)
def test_documents_that_position_ids_tell_apart(inner: Any) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [4, 0, 1, 7, 8, 9, 0]])
    numbers = masking_utils.find_packed_sequence_indices(positions)
    maker = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if maker is None:  # positions are not renumbered before transformers 5.23
        function = masking_utils.and_masks(
            inner, masking_utils.packed_sequence_mask_function(numbers)
        )
    else:
        function = maker(inner, positions, numbers)
    span, stock = _both(function, None, kv_length=TOKENS)
    assert torch.equal(visible(span, TOKENS), stock)


def _odd(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & (key % 2 == 0)


def _made_elsewhere() -> Callable[..., Any]:
    def inner_mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key != query

    return inner_mask


@pytest.mark.parametrize(
    "function",
    [
        _odd,
        masking_utils.and_masks(CAUSAL, _made_elsewhere()),
        masking_utils.or_masks(CAUSAL, masking_utils.sliding_window_overlay(2)),
        masking_utils.blockwise_overlay(torch.tensor([[0] * 7, [1] * 7])),
    ],
    ids=["own", "own in an intersection", "union", "blocks"],
)
def test_what_is_not_known_stays_dense(function: Any) -> None:
    found, stock = _both(function, None, kv_length=TOKENS)
    assert found.dtype == torch.bool
    assert torch.equal(found, stock)


def test_padding_between_tokens_stays_dense() -> None:
    found, stock = _both(CAUSAL, _mask("110111111111", "1" * KEYS), q_offset=5)
    assert found.dtype == torch.bool
    assert torch.equal(found, stock)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_padding_between_tokens_is_an_error_where_nothing_can_wait() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(mask: Tensor) -> Tensor | None:
        return span_mask(
            batch_size=BATCH, q_length=TOKENS, kv_length=KEYS, q_offset=5, attention_mask=mask
        )

    whole, holes = _mask("001111111111", "1" * KEYS), _mask("110111111111", "1" * KEYS)
    stock = masking_utils.sdpa_mask(
        BATCH, TOKENS, KEYS, 5, attention_mask=whole, allow_is_causal_skip=False
    )
    found = compiled(whole)
    assert found is not None
    assert torch.equal(visible(found, KEYS), stock)
    with pytest.raises(RuntimeError, match="attn_implementation='sdpa'"):
        compiled(holes)


def test_spans_take_memory_for_queries_and_not_for_pairs() -> None:
    tokens = 1 << 20  # of pairs there would be 2 ** 40
    mask = torch.ones(1, tokens, dtype=torch.bool)
    span = span_mask(batch_size=1, q_length=tokens, kv_length=tokens, attention_mask=mask)
    assert span is not None
    assert span.shape == (1, 1, tokens, 2)


def test_models_that_make_bools_of_masks_get_them_in_bytes() -> None:
    config = LlamaConfig()
    config.model_type = "kvpatch_mpt"
    how: dict[str, Any] = {"batch_size": BATCH, "q_length": TOKENS, "kv_length": KEYS}
    how |= {"q_offset": 5, "attention_mask": _mask("000011111111", "1" * KEYS)}
    packed, span = span_mask(**how, config=config), span_mask(**how)
    assert packed is not None
    assert span is not None
    assert torch.equal(packed, packed_span(span))
    unpacked = span_of(packed.to(torch.bool))
    assert unpacked is not None
    assert torch.equal(unpacked, span)
    again = span_mask(**{**how, "attention_mask": packed}, config=config)
    assert again is packed


def test_where_no_kernel_runs_masks_are_those_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    how: dict[str, Any] = {"batch_size": BATCH, "q_length": TOKENS, "kv_length": TOKENS}
    assert span_mask(**how) is None
    mask = _mask("0" + "1" * 6, "1" * 7)
    assert torch.equal(
        span_mask(**how, attention_mask=mask),  # type: ignore[arg-type]
        masking_utils.sdpa_mask(**how, attention_mask=mask),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("kind", "maker"),
    [
        (LlamaConfig, masking_utils.create_causal_mask),
        (MistralConfig, masking_utils.create_sliding_window_causal_mask),
    ],
)
def test_the_makers_of_transformers_give_spans(kind: Any, maker: Any) -> None:
    assert "kvpatch_triton" in modeling_utils.ALL_ATTENTION_FUNCTIONS
    config = kind(num_hidden_layers=1, sliding_window=3)
    config._attn_implementation = "kvpatch_triton"
    embeds, cache = torch.zeros(BATCH, TOKENS, 4), DynamicCache(config=config)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    for padding, kv_cache in ((None, cache), (_mask("0" * 3 + "1" * 4, "1" * 7).long(), cache)):
        found = maker(config, embeds, padding, kv_cache)
        config._attn_implementation = "eager"
        stock = maker(config, embeds, padding, kv_cache) == 0
        config._attn_implementation = "kvpatch_triton"
        assert torch.equal(visible(found, TOKENS), stock)
    found = maker(config, embeds, None, None, positions)
    assert found.dtype == torch.int32
