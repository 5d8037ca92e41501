"""The masks of transformers as spans: what ``kvpatch_triton`` is given in place of T * K numbers.

transformers describes a mask by a function of a query and a key, put together from a few parts. A
part that is known here becomes the range of keys that each query sees, and ranges intersect; with
anything else in it the mask is dense, as that of ``sdpa`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as stock

from kvpatch.attention import fused
from kvpatch.models.families_kvpatch import PREFIX
from kvpatch.models.scores_kvpatch import packed_span

__all__ = ["alibi_is_rounded", "span_mask"]

MaskFunction = Callable[..., Any]
Ends = tuple[Tensor, Tensor]  # first key that is seen, and the one after the last: [B or 1, T]

_BEYOND = 1 << 40  # after every key
# their models make bools of all masks
_TO_BOOL = frozenset({"mpt"})


def span_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = stock.causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **how: Any,
) -> Tensor | None:
    """The mask of one forward pass, with the arguments that transformers gives its mask functions.

    Args:
        batch_size: Sequences B.
        q_length: Query tokens T.
        kv_length: Keys K that the attention is given.
        q_offset: Position of the first query; on the device for a static cache.
        kv_offset: Position of the first key; not 0 where a cache forgot what lies before a window.
        mask_function: Of batch entry, head, and positions of query and key.
        attention_mask: Bool [B, positions], which tokens are none of padding.
        config: Of the model.
        device: Of the mask.
        **how: What the mask function of ``sdpa`` has besides.

    Returns:
        Spans int32 [B, 1, T, 2] (in bytes where the model would make bools of them), or a dense
        bool mask [B, 1, T, K] where there are none. Where no kernel runs it is that of ``sdpa``,
        which may be None.
    """
    if attention_mask is not None and attention_mask.ndim > 2:
        return attention_mask  # made before, and come back as packed spans
    runs = fused.obstacle(torch.device(device)) is None and not alibi_is_rounded(config)
    to_bool = _kind(config) in _TO_BOOL
    if runs:
        index = torch.arange(q_length, device=device)[None]
        ends = _ends(mask_function, index + q_offset)
        padded = None if attention_mask is None or ends is None else _tokens(attention_mask)
        if ends is not None and (attention_mask is None or padded is not None):
            ends = ends if padded is None else _both(ends, padded)
            span = _within(ends, kv_offset, kv_length).expand(batch_size, 1, -1, -1).contiguous()
            return packed_span(span) if to_bool else span
    if runs or to_bool:  # None would be a causal mask to us, and nothing at all to them
        how |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense: Tensor | None = stock.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        device=device,
        **how,
    )
    return dense


def alibi_is_rounded(config: Any) -> bool:
    """Whether a model adds ALiBi to its mask rounded position by position, unlike slopes."""
    return _kind(config) == "falcon" and bool(config.alibi)


def _kind(config: Any) -> str:
    kind: str = getattr(config, "model_type", "")
    return kind.removeprefix(PREFIX)


def _ends(function: MaskFunction, at: Tensor) -> Ends | None:
    """Ends of the keys that a mask function shows, or None if it is not known to show a range.

    Args:
        function: One of transformers, or anything.
        at: Positions of the queries [B or 1, T], as the function counts them.
    """
    if function is stock.causal_mask_function:
        return torch.zeros_like(at), at + 1
    if function is stock.bidirectional_mask_function:
        return torch.zeros_like(at), torch.full_like(at, _BEYOND)
    if torch.compiler.is_compiling():
        return None  # Dynamo cannot look into a function
    rule = _RULES.get(getattr(function, "__code__", None))
    if rule is None:
        return None
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return rule(at, **{name: cell.cell_contents for name, cell in zip(names, cells, strict=True)})


def _all(at: Tensor, mask_functions: tuple[MaskFunction, ...]) -> Ends | None:
    parts = [_ends(function, at) for function in mask_functions]
    known = [part for part in parts if part is not None]
    return reduce(_both, known) if len(known) == len(parts) else None


def _window(at: Tensor, sliding_window: int) -> Ends:
    return at - sliding_window + 1, torch.full_like(at, _BEYOND)


def _window_around(at: Tensor, sliding_window: int) -> Ends:
    return at - sliding_window, at + sliding_window + 1


def _chunk(at: Tensor, chunk_size: int, left_padding: Tensor) -> Ends:
    padding = left_padding[:, None]
    start = padding + (at - padding).div(chunk_size, rounding_mode="floor") * chunk_size
    return start, start + chunk_size


def _document(at: Tensor, packed_sequence_mask: Tensor) -> Ends:
    # documents are numbered in their order, and there is no cache: positions are indices
    numbers = packed_sequence_mask.contiguous()
    wanted = numbers.gather(1, at.expand(len(numbers), -1)).contiguous()
    return torch.searchsorted(numbers, wanted), torch.searchsorted(numbers, wanted, right=True)


def _renumbered(at: Tensor, mask_function: MaskFunction, position_ids: Tensor) -> Ends | None:
    # positions count on by one inside a document, which is intersected with this
    positions = position_ids.gather(1, at.expand(len(position_ids), -1))
    ends = _ends(mask_function, positions)
    return None if ends is None else (ends[0] + at - positions, ends[1] + at - positions)


def _rules() -> Mapping[CodeType | None, Callable[..., Ends | None]]:
    """What is known of each maker of mask functions, by the code that its functions share."""
    made: Mapping[str, tuple[tuple[Any, ...], Callable[..., Ends | None]]] = {
        "and_masks": ((stock.causal_mask_function,), _all),
        "sliding_window_overlay": ((1,), _window),
        "sliding_window_bidirectional_overlay": ((1,), _window_around),
        "chunked_overlay": ((1, torch.zeros(1)), _chunk),
        "packed_sequence_mask_function": ((torch.zeros(1, 1),), _document),
        "remap_positions_for_packed_sequence": (
            (stock.causal_mask_function, torch.zeros(1, 1)),
            _renumbered,
        ),
    }
    return {
        getattr(stock, name)(*arguments).__code__: rule
        for name, (arguments, rule) in made.items()
        if hasattr(stock, name)  # transformers 5.17 does not renumber
    }


_RULES = _rules()


def _tokens(mask: Tensor) -> Ends | None:
    """Ends [B, 1] of what is no padding, or None if there are tokens between padding.

    The answer is waited for, as the masks of ``sdpa`` and of flash attention wait for one; where
    nothing can wait, while a graph is traced or recorded, padding between tokens is an error.
    """
    counts = mask.sum(1, keepdim=True)
    start = mask.to(torch.uint8).argmax(1, keepdim=True)
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1, keepdim=True)
    whole = ((last - start + 1 == counts) | (counts == 0)).all()
    if _cannot_wait(mask.device):
        torch._assert_async(
            whole,
            "attention_mask hides tokens between others, which kvpatch_triton can say only outside "
            "of torch.compile and CUDA graphs: use attn_implementation='sdpa'",
        )
    elif not whole:
        return None
    return start, start + counts


def _cannot_wait(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _both(one: Ends, other: Ends) -> Ends:
    return torch.maximum(one[0], other[0]), torch.minimum(one[1], other[1])


def _within(ends: Ends, kv_offset: int | Tensor, keys: int) -> Tensor:
    """Spans int32 [B or 1, 1, T, 2] of the keys at hand; those of nothing are empty."""
    start, end = ((number - kv_offset).clamp(0, keys) for number in ends)
    return torch.stack((start, torch.maximum(start, end)), -1).to(torch.int32).unsqueeze(1)
