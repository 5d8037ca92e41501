"""Names on disk -> the names of the family table.

A checkpoint that was saved through a wrapper (torch.compile, DDP, Lightning, peft, a vision model),
or from the base model alone, has its tensors under other names. The decoder layers show how: what
stands before the name of the first one is the prefix of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from convert.families.family import Family
from kvpatch.errors import InputModelError

__all__ = ["canonical_names", "is_buffer", "layer_and_rest", "refuse_foreign_names"]

# modules that hold one module, anywhere in a model, and compute nothing
_AROUND = frozenset(
    {
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning
        "base_layer",  # peft
    }
)
# modules that hold a whole model
_WRAPPERS = frozenset(
    {"module", "model", "language_model", "base_model", "pretrained_model", "llm"}
)
# tables that classes compute, and older ones stored
_COMPUTED = re.compile(
    r"(^|\.)(((maybe_)?rotary(_pos)?(_emb)?|rope)\.[^.]*(inv_freq|cos|sin)[^.]*"
    r"|position_ids|attn_bias|attn\.embed_positions)$"
)
# endings of names by which other formats are known
_QUANTISED: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8",
    "weight_scale_inv": "FP8 in blocks",
    "SCB": "bitsandbytes in 8 bits",
    "absmax": "bitsandbytes in 4 bits",
    "weight_blocks": "MXFP4",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight_scales": "EETQ",
}
_ADAPTER = re.compile(r"(^|\.)(lora_[A-Z]\w*|lora_embedding_[AB]|hada_\w+|oft_\w+|ia3_\w+)(\.|$)")
_OTHER_HEADS: Mapping[str, str] = {
    "score": "a sequence classification or reward model",
    "classifier": "a classification model",
    "qa_outputs": "a question answering model",
}
# heads that trainers put beside the output embedding, which may be the input's
_VALUE_HEADS = ("v_head", "value_head", "reward_head", "regression_head")


def refuse_foreign_names(names: Iterable[str], heads: Iterable[str], *, tied: bool) -> None:
    """Refuse tensors that say by their names that this is no plain causal language model.

    Args:
        names: Of all tensors of a checkpoint.
        heads: Names that the output embedding can have.
        tied: Whether the output embedding is the input's.

    Raises:
        InputModelError: Naming what it is, and one of the tensors.
    """
    names = list(names)
    for name in names:
        leaf = name.rpartition(".")[2]
        if leaf in _QUANTISED:
            raise InputModelError(
                f"{name!r} shows that the weights are quantised ({_QUANTISED[leaf]})",
                hint="Convert the unquantised checkpoint and quantise the result.",
            )
        if _ADAPTER.search(name):
            raise InputModelError(
                f"{name!r} belongs to an adapter that is not merged into the weights",
                hint="Merge it first: model.merge_and_unload(), then save_pretrained; or save base "
                "and adapter in folders of their own.",
            )
    if any(name.endswith(tuple(heads)) for name in names):
        return
    valued = {} if tied else dict.fromkeys(_VALUE_HEADS, "a reward or value model")
    for name in names:
        for module, what in {**_OTHER_HEADS, **valued}.items():
            if re.search(rf"(^|\.){module}\.", name):
                raise InputModelError(
                    f"this is {what}: it has {name!r} and no output embedding",
                    hint="Convert the causal language model that it was made from.",
                )


def is_buffer(name: str, family: Family) -> bool:
    """Whether a tensor is a mask or table that old checkpoints store and no class reads.

    Args:
        name: By the family table.
        family: Row of the checkpoint.
    """
    masked = any(name.endswith(f".{buffer}") for buffer in family.buffers)
    return masked or _COMPUTED.search(name) is not None


def canonical_names(names: Iterable[str], family: Family) -> dict[str, str]:
    """Name by the family table of every tensor of a checkpoint, by its name on disk.

    Args:
        names: On disk.
        family: Row of the checkpoint.

    Raises:
        InputModelError: If the decoder layers have a prefix that says nothing, or two tensors have
            one name.
    """
    plain = {name: _without_wrapped_parts(name) for name in names}
    prefix = _prefix(list(plain.values()), family)
    outer = _before(prefix, family.base)
    stored: dict[str, str] = {}
    for name, bare in plain.items():
        inside = bare.startswith(prefix) and not _is_head(bare, family)
        own = family.base + bare.removeprefix(prefix) if inside else bare.removeprefix(outer)
        if own in stored:
            raise InputModelError(
                f"{stored[own]!r} and {name!r} are one tensor of this model: {own!r}",
                hint="Remove the one that is stale.",
            )
        stored[own] = name
    return {name: own for own, name in stored.items()}


def _without_wrapped_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _AROUND)


def _is_head(name: str, family: Family) -> bool:
    """Whether a tensor of a checkpoint without a prefix stands outside the base model."""
    return name.partition(".")[0] in {head.partition(".")[0] for head in family.heads}


def _prefix(names: Sequence[str], family: Family) -> str:
    """What stands before the modules of the base model."""
    inside = family.without_base().layer_prefix.format(layer=0) + family.attention
    at_first_layer = re.compile(rf"^((?:.*?\.)?){re.escape(inside)}\.")
    found = {match[1] for name in names if (match := at_first_layer.match(name)) is not None}
    if family.base in found:
        return family.base
    if not found:
        raise InputModelError(
            f"no tensor has a name that {family.architecture} knows: {family.base + inside!r} was "
            f"expected, found are {', '.join(map(repr, names[:3]))}",
            hint="Save the model with save_pretrained of transformers, or correct model_type.",
        )
    known = {prefix for prefix in found if set(prefix.split(".")[:-1]) <= _WRAPPERS | _own(family)}
    if len(known) == 1:
        return known.pop()
    shown = ", ".join(repr(prefix) for prefix in sorted(known or found)[:4])
    raise InputModelError(
        f"the decoder layers are stored under {shown}, where {family.base!r} was expected",
        hint="Save the language model alone, with save_pretrained.",
    )


def _own(family: Family) -> frozenset[str]:
    return frozenset(family.base.split("."))


def _before(prefix: str, base: str) -> str:
    """What stands before the whole model, whose part the base model is."""
    parts, own = prefix.split("."), base.split(".")
    return ".".join([*parts[: -len(own)], ""]) if parts[-len(own) :] == own else ""


def layer_and_rest(name: str, family: Family) -> tuple[int, str] | None:
    """Decoder layer of a tensor and its name inside; None if it belongs to no layer.

    Args:
        name: By the family table.
        family: Row of the checkpoint.
    """
    before = family.layer_prefix.partition("{layer}")[0]
    index, _, rest = name.removeprefix(before).partition(".")
    return (
        (int(index), rest)
        if name.startswith(before) and index.isdecimal() and len(index) < 8
        else None
    )
