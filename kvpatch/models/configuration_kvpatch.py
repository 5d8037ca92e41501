"""Config classes of converted models: the stock config, plus who reads whose keys and values.

``KvpatchLlamaConfig`` and its like are attributes of this module, made when first asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from .families_kvpatch import FAMILIES, Family

__all__ = ["SharedKVConfig", "check_sharing", "config_class"]

# config lists with one entry per layer that a reader and its source must agree in
_KINDS = ("layer_types", "no_rope_layers")


class SharedKVConfig:
    """What a converted model's config has beyond the stock config; mixed into its subclass.

    Args:
        num_key_value_heads: KV heads of every layer that has its own; all heads if None.
        kv_source_layers: Entry i is the layer whose keys and values layer i reads, itself or an
            earlier one that has its own (CLA, arXiv:2405.12981). None: every layer has its own.
    """

    family: Family
    kv_source_layers: list[int] | None
    num_key_value_heads: int | None
    num_attention_heads: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the stock config
        if getattr(self, "auto_map", None) is None:
            self.auto_map = self.family.auto_map
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_sharing(self)

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


def check_sharing(config: Any) -> None:
    """Check the KV heads and the sources of a converted model's config.

    Raises:
        ValueError: Saying which layer reads what, and what would be right. It is the error of
            config validation in transformers; this file cannot know those of kvpatch.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads is {kv_heads}, which does not divide num_attention_heads "
            f"{heads}: give a divisor, so that every KV head serves as many query heads"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError("add_cross_attention is true, but only decoders alone are supported")
    sources = config.kv_source_layers
    if sources is None:
        return
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
    own: dict[str, Any] = {"kv_source_layers": "list[int] | None"}
    if not family.native_gqa:
        own["num_key_value_heads"] = "int | None"
    return type(
        family.class_names["AutoConfig"],
        (SharedKVConfig, stock),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with ``num_key_value_heads`` and ``kv_source_layers``.",
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
