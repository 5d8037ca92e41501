"""Model classes of converted checkpoints: the stock classes with one attention module for all.

``KvpatchLlamaForCausalLM``, ``KvpatchLlamaModel`` and their like are attributes of this module,
made when first asked for, so that only the stock model file at hand is imported.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import conversion_mapping

from .attention_kvpatch import KVAttention, attention_class
from .configuration_kvpatch import check_config, config_class
from .families_kvpatch import FAMILIES, Family
from .latent_kvpatch import LatentAttention, check_table
from .sharing_kvpatch import SharedKV, current_kv, empty_readers, handing_down

__all__ = ["KVHolder", "KVStack", "causal_lm_class", "model_class"]


class KVPreTrained:
    """Initialisation of a stock model whose attention modules are ours; mixed into subclasses."""

    family: Family

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, KVAttention):  # its parts are modules of their own
            module.reset_buffers()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class KVStack(KVPreTrained):
    """What the part of a model that runs the layers has beyond its stock class."""

    config: Any

    def __init__(self, config: Any) -> None:
        check_config(config)
        super().__init__(config)  # type: ignore[call-arg]  # of the stock class
        latent = config.kv_lora_rank is not None
        for index, layer in enumerate(getattr(self, self.family.layers)):
            parent, _, name = self.family.attention.rpartition(".")
            holder = layer.get_submodule(parent)
            stock = getattr(holder, name)
            own = attention_class(LatentAttention if latent else KVAttention, stock.__class__)
            setattr(holder, name, own(stock, config, index, self.family))
            if config.kv_sharing_modes is not None and not self.family.forwards_kwargs:
                layer.__class__ = _layer_class(layer.__class__)
        if latent:
            check_table(config, getattr(self, "rotary_emb", None))
        self.post_init()  # type: ignore[attr-defined]  # initialises what came in

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock model, with a fresh container for shared keys and values."""
        modes = self.config.kv_sharing_modes
        if modes is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        empty_readers(kwargs.get("past_key_values"), modes)
        shared = SharedKV()
        if self.family.forwards_kwargs:
            kwargs["shared_kv_states"] = shared
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        else:
            with handing_down(shared):
                output = super().forward(*args, **kwargs)  # type: ignore[misc]
        empty_readers(kwargs.get("past_key_values"), modes)
        return output


class KVHolder(KVPreTrained):
    """What a model that has such a part has beyond its stock class.

    Attributes:
        part: Name of the part.
        part_class: Our class of it, which takes the place of the stock one.
    """

    part: str
    part_class: type[Any]

    def __init__(self, config: Any) -> None:
        check_config(config)
        with torch.device("meta"):  # the stock part is only there to be replaced
            super().__init__(config)  # type: ignore[call-arg]  # of the stock class
        setattr(self, self.part, self.part_class(config))
        for name, child in self.named_children():  # type: ignore[attr-defined]
            if name != self.part:
                child.to_empty(device=torch.get_default_device())
        self.post_init()  # type: ignore[attr-defined]


@cache
def _layer_class(stock: type[Any]) -> type[nn.Module]:
    """Decoder layer that takes shared keys and values across code that drops keyword arguments.

    The container comes from the forward pass around the call and becomes an argument of the layer,
    which gradient checkpointing keeps for its second run of ``forward``.
    """

    class Layer(stock):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, shared_kv_states=current_kv(), **kwargs)

        def forward(self, *args: Any, shared_kv_states: SharedKV, **kwargs: Any) -> Any:
            with handing_down(shared_kv_states):
                return super().forward(*args, **kwargs)

    Layer.__name__ = Layer.__qualname__ = f"Kvpatch{stock.__name__}"
    return Layer


@cache
def model_class(family: Family) -> type[Any]:
    """The base model class of a family; imports its stock model file."""
    stock = _stock(family, f"{family.stem}Model")
    name = family.class_names["AutoModel"]
    if family.decoder is None:
        return _subclass(family, name, (KVStack, stock), _auto_class="AutoModel")
    decoder = _stock(family, f"{family.stem}Decoder")
    return _subclass(
        family,
        name,
        (KVHolder, stock),
        _auto_class="AutoModel",
        part=family.decoder,
        part_class=_subclass(family, f"Kvpatch{decoder.__name__}", (KVStack, decoder)),
    )


@cache
def causal_lm_class(family: Family) -> type[Any]:
    """The causal LM class of a family; imports its stock model file."""
    stock = _stock(family, family.stock_causal_lm)
    name = family.class_names["AutoModelForCausalLM"]
    renamed = conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__)
    if renamed is not None:  # names on disk are those of the stock class
        conversion_mapping.register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    return _subclass(
        family,
        name,
        (KVHolder, stock),
        _auto_class="AutoModelForCausalLM",
        part=family.base,
        part_class=model_class(family),
    )


def _stock(family: Family, name: str) -> type[Any]:
    folder = family.stock_package.rpartition(".")[2]
    stock: type[Any] = getattr(import_module(f"{family.stock_package}.modeling_{folder}"), name)
    return stock


def _subclass(family: Family, name: str, bases: tuple[type[Any], ...], **members: Any) -> type[Any]:
    own = {
        "__module__": __name__,
        "__doc__": f"{bases[-1].__name__} with fewer, shared or latent keys and values.",
        "config_class": config_class(family),
        "family": family,
    }
    return type(name, bases, own | members)


_MAKERS = {
    family.class_names[auto]: (maker, family)
    for family in FAMILIES.values()
    for auto, maker in (("AutoModel", model_class), ("AutoModelForCausalLM", causal_lm_class))
}


def __getattr__(name: str) -> Any:
    if name not in _MAKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    maker, family = _MAKERS[name]
    return maker(family)
