"""Config classes of converted models: the stock config, plus what is cached and who reads it.

``KvpatchLlamaConfig`` and its like are attributes of this module, made when first asked for.
"""

from __future__ import annotations

from functools import cache, reduce
from importlib import import_module
from typing import Any

from .families_kvpatch import FAMILIES, Family

__all__ = ["SharedKVConfig", "check_config", "config_class"]

# config lists with one entry per layer that a reader and its source must agree in
_KINDS = ("layer_types", "no_rope_layers", "kv_lora_rank", "kv_rope_planes")


class SharedKVConfig:
    """What a converted model's config has beyond the stock config; mixed into its subclass.

    Args:
        num_key_value_heads: KV heads of every layer that has its own; all heads if None. With
            latents it counts only where keys have a norm, whose factor is one for each of them.
        kv_source_layers: Entry i is the layer whose keys and values layer i reads, itself or an
            earlier one that has its own (CLA, arXiv:2405.12981). None: every layer has its own.
        kv_lora_rank: Dims of the latent that each layer caches in place of keys and values (MLA,
            arXiv:2405.04434). None: ordinary attention; the next three are None then, too.
        kv_rope_planes: For each layer and each pair of its rotary key the plane of the stock
            model's rotary table that turns it; in any order, any number of times, or none.
        qk_nope_head_dim: Dims of a query or key head without positions.
        v_head_dim: Dims of a value head.
    """

    family: Family
    kv_source_layers: list[int] | None
    kv_lora_rank: list[int] | None
    kv_rope_planes: list[list[int]] | None
    qk_nope_head_dim: int | None
    v_head_dim: int | None
    num_key_value_heads: int | None
    num_attention_heads: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the stock config
        if getattr(self, "auto_map", None) is None:
            self.auto_map = self.family.auto_map
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_config(self)

    @property
    def qk_head_dim(self) -> int | None:
        """Dims of the widest query head of a latent model; None for ordinary attention.

        It tells transformers that a static cache cannot be sized before it is written to.
        """
        if self.kv_lora_rank is None:
            return None
        assert self.qk_nope_head_dim is not None
        assert self.kv_rope_planes is not None
        return self.qk_nope_head_dim + 2 * max(map(len, self.kv_rope_planes))

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """Per layer ``reuse`` (no cache), ``store`` (others read it too) or None.

        The caches of transformers 5.23 ask for this property; None is none at all.
        """
        sources = self.kv_source_layers
        if sources is None:
            return None
        shared = {source for layer, source in enumerate(sources) if source != layer}
        return [
            "reuse" if source != layer else "store" if layer in shared else None
            for layer, source in enumerate(sources)
        ]


def check_config(config: Any) -> None:
    """Check the KV heads, the latents and the sources of a converted model's config.

    Raises:
        ValueError: Saying what is wrong in which layer, and what would be right. It is the error
            of config validation in transformers; this file cannot know those of kvpatch.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads is {kv_heads}, which does not divide num_attention_heads "
            f"{heads}: give a divisor, so that every KV head serves as many query heads"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError("add_cross_attention is true, but only decoders alone are supported")
    _check_latents(config)
    if config.kv_source_layers is not None:
        _check_sources(config, config.kv_source_layers)


def _check_latents(config: Any) -> None:
    lists = ("kv_lora_rank", "kv_rope_planes")
    keys = (*lists, "qk_nope_head_dim", "v_head_dim")
    absent = [key for key in keys if getattr(config, key) is None]
    if len(absent) == len(keys):
        return
    if absent:
        raise ValueError(f"{', '.join(keys)} belong together, but there is no {', '.join(absent)}")
    for key in lists:
        entries, layers = getattr(config, key), config.num_hidden_layers
        if len(entries) != layers:
            raise ValueError(
                f"{key} has {len(entries)} entries, but there are {layers} layers "
                "(num_hidden_layers): give one entry per layer"
            )
    for key, least in (("qk_nope_head_dim", 0), ("v_head_dim", 1)):
        if not _counts(getattr(config, key), least):
            raise ValueError(f"{key} is {getattr(config, key)!r}: give a number from {least} on")
    if config.family.clip and reduce(getattr, config.family.clip, config):
        key = ".".join(config.family.clip)
        raise ValueError(f"{key} clamps keys and values, which latent attention does not have")
    for layer, (rank, planes) in enumerate(zip(*(getattr(config, k) for k in lists), strict=True)):
        if not _counts(rank, 1):
            raise ValueError(f"kv_lora_rank: layer {layer} has {rank!r}: give a number from 1 on")
        _check_planes(config, layer, planes)


def _check_planes(config: Any, layer: int, planes: list[int]) -> None:
    """Check what config.json alone says; the model knows how many planes its table has."""
    family: Family = config.family
    if planes and (family.rotary is None or getattr(config, "alibi", False)):
        raise ValueError(
            f"kv_rope_planes: layer {layer} has {planes}, but this model has no rotary positions: "
            "give an empty list for every layer"
        )
    width = getattr(config, "rotary_dim" if family.rotary == "sinusoids" else "head_dim", None)
    count = (width or config.hidden_size // config.num_attention_heads) // 2
    for plane in planes:
        if not _counts(plane, 0) or plane >= count:
            raise ValueError(
                f"kv_rope_planes: layer {layer} has {plane!r}, but a head has the planes "
                f"0 to {count - 1}"
            )
    if not planes and not config.qk_nope_head_dim:
        raise ValueError(
            f"kv_rope_planes: layer {layer} has none, and qk_nope_head_dim is 0: its queries "
            "would have no dims at all"
        )


def _counts(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _check_sources(config: Any, sources: list[int]) -> None:
    layers = config.num_hidden_layers
    if len(sources) != layers:
        raise ValueError(
            f"kv_source_layers has {len(sources)} entries, but there are {layers} layers "
            f"(num_hidden_layers): give one source per layer, i for a layer i with its own KV"
        )
    for layer, source in enumerate(sources):
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source <= layer:
            raise ValueError(
                f"kv_source_layers: layer {layer} cannot read the keys and values of layer "
                f"{source!r}: expected its own index or that of an earlier layer, 0 to {layer}"
            )
        if sources[source] != source:
            raise ValueError(
                f"kv_source_layers: layer {layer} reads layer {source}, which has no keys and "
                f"values of its own, it reads layer {sources[source]}: name that layer instead"
            )
        for key in _KINDS:
            kinds = getattr(config, key, None)
            if kinds is not None and kinds[layer] != kinds[source]:
                raise ValueError(
                    f"kv_source_layers: layer {layer} reads layer {source}, but their {key} differ "
                    f"({kinds[layer]!r} and {kinds[source]!r}): a layer can read only a cache of "
                    "its own kind, so choose a source with the same entry"
                )
    layerdrop = getattr(config, "layerdrop", None)
    if layerdrop and any(config.kv_sharing_modes):
        raise ValueError(
            f"layerdrop is {layerdrop}, but a dropped layer leaves those that read its "
            "keys and values without any: set layerdrop to 0 in config.json"
        )


@cache
def config_class(family: Family) -> type[Any]:
    """The config class of a family; imports its stock config."""
    stock = getattr(import_module(f"{family.stock_package}"), f"{family.stem}Config")
    own: dict[str, Any] = {
        "kv_source_layers": "list[int] | None",
        "kv_lora_rank": "list[int] | None",
        "kv_rope_planes": "list[list[int]] | None",
        "qk_nope_head_dim": "int | None",
        "v_head_dim": "int | None",
    }
    if not family.native_gqa:
        own["num_key_value_heads"] = "int | None"
    return type(
        family.class_names["AutoConfig"],
        (SharedKVConfig, stock),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with fewer, shared or latent keys and values.",
            "__annotations__": own,
            "family": family,
            "model_type": family.converted_type,
            "_auto_class": "AutoConfig",
            **dict.fromkeys(own),
        },
    )


_FAMILY_OF = {family.class_names["AutoConfig"]: family for family in FAMILIES.values()}


def __getattr__(name: str) -> Any:
    if name not in _FAMILY_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(_FAMILY_OF[name])
