"""Mutations of tensors: names, shapes, dtypes and what they hold, in files that are sound."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from tests.fuzz.draft import Draft, Mutation

__all__ = ["TENSORS"]

_PREFIXES = ("model.", "transformer.", "module.", "base_model.model.", "language_model.", "_", ".")
_EXTRA = (
    "lm_head.bias",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.q_norm.weight",
    "model.layers.9.self_attn.q_proj.weight",
    "model.layers.-1.mlp.weight",
    "model.layers.01.mlp.weight",
    "transformer.h.0.attn.bias",
    "transformer.h.0.attn.masked_bias",
    "transformer.h.0.attn.c_attn.scale",
    "score.weight",
    "v_head.summary.weight",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.weight_scale",
    "x",
    "",
    "ü\n\u202e",
    "n" * 3000,
)


def prefix_added(draft: Draft, random: Random) -> str:
    prefix = random.choice(_PREFIXES)
    return _renamed_all(draft, lambda name: prefix + name, f"{prefix}*")


def prefix_removed(draft: Draft, random: Random) -> str:
    return _renamed_all(draft, lambda name: name.partition(".")[2] or name, "")


def base_prefix_removed(draft: Draft, random: Random) -> str:
    def bare(name: str) -> str:
        return name.removeprefix("model.").removeprefix("transformer.")

    return _renamed_all(draft, bare, "")


def renamed(draft: Draft, random: Random) -> str:
    new = random.choice((*_EXTRA, None, None))

    def change(tensors: dict[str, Tensor], name: str) -> str:
        to = name.replace("weight", "wieght") if new is None else new
        tensors[to] = tensors.pop(name)
        return f"to {to[:80]!r}"

    return _one(draft, random, change)


def duplicated(draft: Draft, random: Random) -> str:
    new = random.choice((*_EXTRA, "lm_head.weight", "lm_head.weight"))

    def change(tensors: dict[str, Tensor], name: str) -> str:
        tensors[new] = tensors[name]
        return f"also {new[:80]!r}"

    return _one(draft, random, change)


def one_more(draft: Draft, random: Random) -> str:
    shape = random.choice(((), (0,), (1,), (48,), (48, 48), (97, 48), (1, 1, 64, 64)))
    dtype = random.choice((torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8))
    new = random.choice(_EXTRA)

    def change(tensors: dict[str, Tensor], _: str) -> str:
        tensors[new] = torch.ones(shape, dtype=dtype)
        return f"{new[:80]!r} {shape} {dtype}"

    return _one(draft, random, change)


def missing(draft: Draft, random: Random) -> str:
    def change(tensors: dict[str, Tensor], name: str) -> str:
        del tensors[name]
        return ""

    return _one(draft, random, change)


def reshaped(draft: Draft, random: Random) -> str:
    kind, make = random.choice(_SHAPES)

    def change(tensors: dict[str, Tensor], name: str) -> str:
        tensors[name] = make(tensors[name])
        return f"{kind} {tuple(tensors[name].shape)}"

    return _one(draft, random, change)


def reshaped_alike(draft: Draft, random: Random) -> str:
    kind, make = random.choice(_SHAPES)
    return _alike(draft, random, make, kind)


_SHAPES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("transposed", lambda t: t.T if t.dim() == 2 else t.flip(0)),
    ("a row more", lambda t: torch.cat([t, t[:1]]) if t.dim() else t[None]),
    ("a row less", lambda t: t[1:] if t.dim() else t),
    ("flattened", lambda t: t.flatten()),
    ("no rows", lambda t: t[:0] if t.dim() else t),
    ("no columns", lambda t: t[..., :0] if t.dim() else t),
    ("a dim more", lambda t: t[None]),
    ("twice", lambda t: torch.cat([t, t]) if t.dim() else t),
    ("half", lambda t: t[: len(t) // 2] if t.dim() else t),
)

_DTYPES = (
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
)


def dtype(draft: Draft, random: Random) -> str:
    draft.numbers, to = True, random.choice(_DTYPES)

    def change(tensors: dict[str, Tensor], name: str) -> str:
        tensors[name] = _cast(tensors[name], to)
        return str(to)

    return _one(draft, random, change)


def dtype_alike(draft: Draft, random: Random) -> str:
    draft.numbers, to = True, random.choice(_DTYPES)
    return _alike(draft, random, lambda tensor: _cast(tensor, to), str(to))


def dtype_of_all(draft: Draft, random: Random) -> str:
    draft.numbers, to = True, random.choice(_DTYPES)
    for file in draft.files:
        draft.store(file, {name: _cast(t, to) for name, t in draft.tensors(file).items()})
    return str(to)


_CONTENTS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("NaN", lambda t: torch.full_like(t, torch.nan)),
    ("infinite", lambda t: torch.full_like(t, -torch.inf)),
    ("zeros", torch.zeros_like),
    ("ones", torch.ones_like),
    ("1e30", lambda t: t * 1e30),
    ("1e38", lambda t: torch.full(t.shape, 1e38).to(t.dtype)),
    ("70000", lambda t: torch.full(t.shape, 70000.0).to(t.dtype)),
    ("1e-40", lambda t: torch.full(t.shape, 1e-40).to(t.dtype)),
    ("1e-25", lambda t: t * 1e-25),
    ("equal rows", lambda t: t[:1].expand(t.shape) if t.dim() else t),
    ("one NaN", lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 0, torch.nan, t)),
)


def _cast(tensor: Tensor, to: torch.dtype) -> Tensor:
    return (tensor.real if tensor.is_complex() else tensor).to(to)


def _filled(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    return make(_cast(tensor, torch.float32)).to(tensor.dtype)


def contents(draft: Draft, random: Random) -> str:
    draft.numbers = True
    kind, make = random.choice(_CONTENTS)

    def change(tensors: dict[str, Tensor], name: str) -> str:
        tensors[name] = _filled(tensors[name], make)
        return kind

    return _one(draft, random, change)


def contents_alike(draft: Draft, random: Random) -> str:
    draft.numbers = True
    kind, make = random.choice(_CONTENTS)
    return _alike(draft, random, lambda tensor: _filled(tensor, make), kind)


def moved(draft: Draft, random: Random) -> str:
    """To another file; the index follows."""
    file = random.choice(draft.files)
    tensors = draft.tensors(file)
    name = random.choice(sorted(tensors))
    draft.store(draft.source / "other.safetensors", {name: tensors.pop(name)})
    draft.store(file, tensors)
    draft.reindex(draft.index)
    return name


def _one(draft: Draft, random: Random, change: Callable[[dict[str, Tensor], str], str]) -> str:
    """Change one tensor, or what is beside it."""
    file = random.choice(draft.files)
    tensors = draft.tensors(file)
    name = random.choice(sorted(tensors))
    done = change(tensors, name)
    draft.store(file, tensors)
    return f"{name[:80]!r} {done}"


def _alike(draft: Draft, random: Random, make: Callable[[Tensor], Tensor], done: str) -> str:
    """Change the tensors of one name in all layers."""
    name = random.choice(sorted(name for file in draft.files for name in draft.tensors(file)))
    ending = ".".join(name.split(".")[-2:])
    for file in draft.files:
        tensors = draft.tensors(file)
        draft.store(file, {n: make(t) if n.endswith(ending) else t for n, t in tensors.items()})
    return f"*{ending[:80]!r} {done}"


def _renamed_all(draft: Draft, rename: Callable[[str], str], done: str) -> str:
    for file in draft.files:
        draft.store(file, {rename(name): t for name, t in draft.tensors(file).items()})
    return done


TENSORS = tuple(
    Mutation(1, change)
    for change in (
        prefix_added,
        prefix_removed,
        base_prefix_removed,
        renamed,
        duplicated,
        one_more,
        missing,
        reshaped,
        reshaped_alike,
        dtype,
        dtype_alike,
        dtype_of_all,
        contents,
        contents,
        contents_alike,
        moved,
    )
)
