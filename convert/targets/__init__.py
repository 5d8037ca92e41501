"""Targets: what a conversion is written as. Descriptions only; the engine reads and writes.

To write conversions of a family for a stock class of another one, add a ``Carrier`` to the file of
that class; a family whose own class has a KV-head count needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

from convert.facts import ModelFacts
from convert.targets.carrier import carried
from convert.targets.gpt_bigcode import GPT_BIGCODE
from convert.targets.native import same_class
from convert.targets.patched import patched_class
from convert.targets.phi import PHI
from convert.targets.starcoder2 import STARCODER2
from convert.targets.target import Constant, Rewrite, Target
from kvpatch.errors import UsageError

__all__ = ["Constant", "Rewrite", "Target", "targets_for"]


def targets_for(
    facts: ModelFacts, *, kv_heads: int, kv_source_layers: Sequence[int] | None = None
) -> tuple[Target, ...]:
    """All classes that hold a conversion exactly, best first: of transformers, then of kvpatch.

    Args:
        facts: The source.
        kv_heads: KV heads of every layer that has its own.
        kv_source_layers: For each layer the one whose keys and values it reads; None if all have
            their own.

    Raises:
        UsageError: If no class does.
    """
    shared = kv_source_layers is not None and list(kv_source_layers) != list(range(facts.layers))
    targets: list[Target | None] = []
    if not shared:
        targets.append(same_class(facts, kv_heads=kv_heads))
        targets += carried((*PHI, *STARCODER2, *GPT_BIGCODE), facts, kv_heads=kv_heads)
    sources = kv_source_layers if shared else None
    targets.append(patched_class(facts, kv_heads=kv_heads, kv_source_layers=sources))
    possible = tuple(target for target in targets if target is not None)
    if not possible:
        what = "layers that share keys and values" if shared else f"{kv_heads} KV heads"
        raise UsageError(
            f"no model class holds a {facts.family.model_type} model with {what}",
            hint="Keys and values can be shared inside the layers of this model: give --kv-heads."
            if facts.family.gqa
            else None,
        )
    return possible
