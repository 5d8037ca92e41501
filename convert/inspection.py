"""What ``kvpatch inspect`` shows: a model's attention, and KV cache sizes of every design."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import read_json
from convert.facts import (
    ModelFacts,
    read_facts,
)
from convert.hub import fetch_config
from convert.latent_sizes import Sizes, most_dims
from convert.latents import latent_architecture
from convert.opening import open_model, refuse_latents
from convert.sharing import uniform_plan
from convert.targets import targets_for
from kvpatch.errors import UsageError
from kvpatch.memory import KVCache, latent_cache, multi_head_cache
from kvpatch.models import PREFIX

__all__ = ["CacheRow", "cache_rows", "describe", "inspect_dims", "inspect_source"]

_WINDOW = 4096  # tokens, that of Mistral-7B


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One design in the table of cache sizes.

    Args:
        design: Its name.
        cache: Its KV cache.
        command: The command that converts to it; None where it is shown for comparison.
    """

    design: str
    cache: KVCache
    command: str | None = None


def inspect_source(source: str, *, revision: str | None = None) -> tuple[ModelFacts, list[str]]:
    """Facts of a model and warnings about its files.

    A local folder is checked down to its headers if it holds weights; of a Hub repository only
    config.json is fetched.

    Raises:
        KvpatchError: If there is no such source, or it is damaged or unsupported.
    """
    found = fetch_config(source, revision=revision)
    has_weights = any(
        path.suffix in {".safetensors", ".bin", ".gguf"} for path in found.path.iterdir()
    ) or any(found.path.glob("*.index.json"))
    if not has_weights:
        config = read_json(guarded_path(found.path, "config.json"))
        refuse_latents(config)
        return read_facts(config), ["no weights here: shapes were not checked"]
    with open_model(found, adapter="ignore", allow_pickle=True) as model:
        return model.facts, list(model.warnings)


def inspect_dims(
    *, layers: int, heads: int, head_dim: int, kv_heads: int | None, bytes_per_value: int
) -> list[CacheRow]:
    """Cache sizes for bare dimensions."""
    return cache_rows(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        windows=(None,) * layers,
        bytes_per_value=bytes_per_value,
        window=_WINDOW,
        pairs=_pairs_of(layers) if layers > 1 else None,
        most_latents=Sizes(heads * head_dim, (kv_heads or heads) * head_dim // 2 * 2),
        key_scales=0,
    )


def facts_rows(facts: ModelFacts) -> list[CacheRow]:
    """Cache sizes of a model now and under every design."""
    return cache_rows(
        layers=facts.layers,
        heads=facts.geometry.heads,
        kv_heads=facts.geometry.kv_heads,
        head_dim=facts.geometry.head_dim,
        windows=facts.windows,
        bytes_per_value=facts.cache().bytes_per_value,
        window=min(_WINDOW, facts.context // 4),
        pairs=_pairs(facts),
        most_latents=most_dims(facts) if _latent_conversion(facts) else None,
        key_scales=facts.key_scales,
    )


def _pairs_of(layers: int) -> list[int]:
    return [layer - layer % 2 for layer in range(layers)]


def _pairs(facts: ModelFacts) -> Sequence[int] | None:
    """What ``kvpatch cla --share 2`` makes of a model; None where it cannot."""
    if facts.family.model_type.startswith(PREFIX):
        return None
    try:
        sources = uniform_plan(facts, 2, 0, facts.layers)
        targets_for(facts, kv_heads=facts.geometry.kv_heads, kv_source_layers=sources)
    except UsageError:
        return None
    return sources


def cache_rows(
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    windows: Sequence[int | None],
    bytes_per_value: int,
    window: int,
    pairs: Sequence[int] | None,
    most_latents: Sizes | None,
    key_scales: int,
) -> list[CacheRow]:
    """The table: the model as it is, GQA for every divisor, MQA, CLA2, MLA and a sliding window.

    CLA2 is that of ``pairs``, for each layer the one that it reads, and has a command if they are
    given.
    MLA has the proportions of DeepSeek-V2 (arXiv:2405.04434, section 3.1.2): rank ``4 * head_dim``
    and ``head_dim / 2`` rotary dims, as far as ``most_latents`` allows; it has a command if that is
    given. ``key_scales`` numbers are cached beside them.
    """
    own, read = list(range(layers)), pairs or _pairs_of(layers)

    def shared(
        kv: int, sources: Sequence[int] = own, spans: Sequence[int | None] = windows
    ) -> KVCache:
        return multi_head_cache(
            layers=layers,
            kv_heads=kv,
            head_dim=head_dim,
            sources=sources,
            windows=spans,
            bytes_per_value=bytes_per_value,
        )

    now = "MHA" if kv_heads == heads else ("MQA" if kv_heads == 1 else "GQA")
    rows = [CacheRow(f"{now}, {kv_heads} KV heads (now)", shared(kv_heads))]
    for n in reversed([n for n in range(2, kv_heads) if kv_heads % n == 0]):
        rows.append(CacheRow(f"GQA, {n} KV heads", shared(n), f"kvpatch gqa --kv-heads {n}"))
    if kv_heads > 1:
        rows.append(CacheRow("MQA, 1 KV head", shared(1), "kvpatch mqa"))
    cla = None if pairs is None else "kvpatch cla --share 2"
    rows.append(CacheRow(f"CLA2, {kv_heads} KV heads", shared(kv_heads, read), cla))
    if kv_heads > 1:
        rows.append(CacheRow("CLA2 + MQA", shared(1, read), cla and f"{cla} --kv-heads 1"))
    rank, rope_dim = 4 * head_dim, max(2, head_dim // 4 * 2)
    command = None
    if most_latents is not None:
        rank, rope_dim = min(rank, most_latents.rank), min(rope_dim, most_latents.rope_dims)
        command = f"kvpatch mla --kv-budget {rank}+{rope_dim}"
    rows.append(
        CacheRow(
            f"MLA, rank {rank} + {rope_dim} rotary",
            latent_cache(
                layers=layers,
                rank=rank,
                rope_dim=rope_dim,
                scales=key_scales,
                windows=windows,
                bytes_per_value=bytes_per_value,
            ),
            command,
        )
    )
    if any(span is None for span in windows):
        design = f"{now}, {kv_heads} KV heads, window of {window:,} tokens"
        rows.append(CacheRow(design, shared(kv_heads, spans=(window,) * layers)))
    return rows


def describe(facts: ModelFacts) -> Mapping[str, Any]:
    """The attention of a model in words and numbers."""
    geometry, rope = facts.geometry, facts.ropes[0]
    kinds = sorted({rope.kind for rope in facts.ropes})
    pairs = "interleaved" if rope.interleaved else "half-split"
    thetas = sorted({rope.theta for rope in facts.ropes})
    windows = [window for window in facts.windows if window is not None]
    norm = facts.qk_norm
    legal = facts.legal_kv_heads()
    return {
        "family": facts.family.model_type,
        "class": facts.family.architecture,
        "layers": facts.layers,
        "hidden": geometry.hidden,
        "query_heads": geometry.heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "rope": (
            f"{' and '.join(kinds)}, {pairs} pairs, {rope.dim} of {geometry.head_dim} dims, "
            f"theta {', '.join(f'{theta:g}' for theta in thetas)}"
        ),
        "layers_without_rope": [i for i, rope in enumerate(facts.ropes) if not rope.dim],
        "qk_norm": f"{norm.layout}, {norm.formula}" if norm is not None else None,
        "softcap": facts.softcap,
        "clip_qkv": facts.clip,
        "window_layers": len(windows),
        "window": windows[0] if windows else None,
        "context": facts.context,
        "dtype": facts.dtype,
        "tied_embeddings": facts.tied,
        "conversions": {
            "gqa": _conversion(facts, legal),
            "mqa": _conversion(facts, legal[:1]),
            "mla": _latent_conversion(facts),
        },
    }


def _conversion(facts: ModelFacts, kv_heads: Sequence[int]) -> Mapping[str, Any] | None:
    """KV-head counts to choose from, and the class that holds the largest of them."""
    if not kv_heads or facts.family.model_type.startswith(PREFIX):
        return None
    target = targets_for(facts, kv_heads=kv_heads[-1])[0]
    return {"kv_heads": list(kv_heads), "target": target.architecture}


def _latent_conversion(facts: ModelFacts) -> Mapping[str, Any] | None:
    """The class that holds latents of a model."""
    if facts.family.model_type.startswith(PREFIX):
        return None
    target = latent_architecture(facts)
    return None if target is None else {"target": target}
