"""Adapters of a source: whether one is wanted, and what it changes in its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch

from convert.checkpoint.adapted import AdaptedCheckpoint, Change
from convert.checkpoint.adapter import Adapter, find_adapter
from convert.checkpoint.adapter_config import ADAPTER_CONFIG
from convert.checkpoint.reader import Checkpoint
from convert.families import FAMILIES, Family
from convert.families.naming import layer_and_rest
from convert.hub import Source, fetch_config
from kvpatch.errors import InputModelError, UsageError
from kvpatch.models import PREFIX

__all__ = [
    "AdapterChoice",
    "adapter_choice",
    "chosen_adapter",
    "described",
    "made_with",
    "merged",
]

AdapterChoice = Literal["merge", "ignore"]
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adapter_choice(word: str | None) -> AdapterChoice | None:
    """The choice that a flag makes.

    Raises:
        UsageError: If it is none.
    """
    choice: AdapterChoice
    for choice in get_args(AdapterChoice):
        if word == choice:
            return choice
    if word is not None:
        raise UsageError(f"--adapter {word}: choose merge or ignore")
    return None


def made_with(manifest: Mapping[str, Any]) -> AdapterChoice:
    """What a result was made of, by its kvpatch.json, where an adapter lies at its source."""
    steps = (manifest, *manifest.get("lineage", []))
    found = (step["recipe"].get("adapter") for step in steps)
    choice: AdapterChoice = next(filter(None, found), "ignore")
    return choice


def described(text: str, revision: str | None) -> tuple[str, str | None, str | None]:
    """Where the config.json of a source is, at which revision, and what to know of its adapter.

    Args:
        text: Folder, or ``org/name[@revision]``.
        revision: Of a repository.

    Raises:
        KvpatchError: As of ``fetch_config``.
    """
    source = fetch_config(text, revision=revision)
    if source.base is not None:
        what = f"this is an adapter of {source.base.name}, which is described here"
        return str(source.base.path), None, f"{what}; conversions merge it"
    if not (source.path / ADAPTER_CONFIG).exists():
        return text, revision, None
    beside = f"an adapter lies beside the weights ({ADAPTER_CONFIG})"
    return text, revision, f"{beside}: conversions need --adapter merge or --adapter ignore"


def chosen_adapter(
    source: Source, choice: AdapterChoice | None, *, allow_pickle: bool = False
) -> Adapter | None:
    """The adapter that is to be merged into a source; None if there is none, or it stays out.

    Args:
        source: With its base, if it is an adapter alone.
        choice: What is to be done with an adapter; one alone is merged.
        allow_pickle: Read ``.bin`` files too, with ``weights_only``.

    Raises:
        UsageError: If there is an adapter and no choice, or the choice is none that there is.
        InputModelError: If the adapter is none that can be merged.
    """
    if source.base is not None:
        if choice == "ignore":
            raise UsageError(
                f"{source.name} is an adapter without weights; without it, nothing is left",
                hint=f"Name its base instead: {source.base.repository or source.base.path}",
            )
        if (source.base.path / ADAPTER_CONFIG).exists():
            raise UsageError(
                f"the adapter {source.name} is one of {source.base.name}, which is or has an "
                "adapter itself",
                hint="Merge that one into its base first, and save the model.",
            )
    elif not (source.path / ADAPTER_CONFIG).exists():
        return None
    elif choice is None:
        raise UsageError(
            f"an adapter lies beside the weights of {source.name} ({ADAPTER_CONFIG}), and "
            "transformers loads both as one model",
            hint="Give --adapter merge to take base and adapter as that model, or --adapter ignore "
            "to take the base alone.",
        )
    elif choice == "ignore":
        return None
    return find_adapter(source.path, allow_pickle=allow_pickle, sizes=source.sizes)


def merged(checkpoint: Checkpoint, adapter: Adapter, family: Family) -> AdaptedCheckpoint:
    """A checkpoint with an adapter merged into what is read of it.

    Embeddings that are one tensor stay so if the adapter says that it keeps them tied, and become
    two if it changes one of them, or both by factors of their own.

    Args:
        checkpoint: The open base, its tensors under the names of the family table.
        adapter: The adapter.
        family: Row of the base.

    Raises:
        InputModelError: If the adapter is of another model.
    """
    base = _Base(checkpoint, family)
    strange, changes = [], dict[str, Change]()
    for name, stored, shape, change in _wanted(adapter, base):
        at = base.place(name)
        if at is None:
            strange.append(stored)
            continue
        base.check(at, shape, f"{adapter.file}: {stored!r}")
        first = changes.get(at, Change()).instead
        changes[at] = change if first is None else dataclasses.replace(change, instead=first)
    lacking = [n for n in checkpoint.tensors if adapter.is_copy(n) and n not in changes]
    if strange or lacking:
        raise _of_another_model(adapter, strange, lacking)
    copies = {base.place(name) for name in adapter.replaced if adapter.is_copy(name)}
    changes, untied = base.with_head(changes, copies, adapter)
    return AdaptedCheckpoint(checkpoint, adapter, changes, untied=untied)


def _wanted(adapter: Adapter, base: _Base) -> Iterator[tuple[str, str, tuple[int, ...], Change]]:
    """Tensors of the base as peft names them, that of the adapter, the shape, and the change."""
    for name, stored in adapter.replaced.items():
        yield name, stored, adapter.tensors[stored].shape, Change(instead=stored)
    for module, factors in adapter.modules.items():
        weight = f"{module}.weight"
        out, into = adapter.tensors[factors.b].shape[0], adapter.tensors[factors.a].shape[1]
        flipped = factors.embedding or base.transposes(weight)
        shape = (into, out) if flipped else (out, into)
        yield weight, factors.a, shape, Change(factors=factors, flipped=flipped)
        if factors.bias is not None:
            yield f"{module}.bias", factors.bias, (out,), Change(factors=factors, bias=True)


def _of_another_model(adapter: Adapter, strange: list[str], lacking: list[str]) -> InputModelError:
    what = (
        f"holds {len(strange)} tensors for which the base has no place: {strange[:4]}"
        if strange
        else f"lacks {lacking[:4]}, which its modules_to_save name"
    )
    base = adapter.config.get("base_model_name_or_path")
    return InputModelError(
        f"{adapter.file} {what}",
        hint=f"It is an adapter of {base!r}; merge it into that model, with the head that it has.",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Base:
    """Names and shapes of what an adapter is merged into."""

    checkpoint: Checkpoint
    family: Family

    @property
    def head(self) -> str:
        """Name of the output embedding, whether it is stored or not."""
        heads = self.family.heads
        return next((name for name in heads if name in self.checkpoint.tensors), heads[0])

    @property
    def embedding(self) -> str:
        """Name of the input embedding, as it is stored."""
        stored = self.place(self.family.embedding)
        return stored or self.family.embedding

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one tensor."""
        return bool(self.family.completed(self.checkpoint.config).get("tie_word_embeddings"))

    def place(self, name: str) -> str | None:
        """Name of the tensor that transformers calls ``name``; None if there is none."""
        if name in self.family.heads and (self.tied or self.head in self.checkpoint.tensors):
            return self.head
        return name if name in self.checkpoint.tensors else None

    def transposes(self, name: str) -> bool:
        """Whether the weight of a module is [in, out], as that of Conv1D."""
        place = layer_and_rest(name, self.family)
        if place is None:
            return False
        module = place[1].removesuffix(".weight")
        own = {p.name: p.transposed for p in self.family.projections}
        if module in own:
            return own[module]
        stock = FAMILIES.get(self.family.model_type.removeprefix(PREFIX))
        return stock is not None and any(p.transposed for p in stock.projections)

    def check(self, at: str, shape: tuple[int, ...], what: str) -> None:
        """Refuse a change of another shape, or of numbers that none can be added to."""
        info = self.checkpoint.tensors.get(at) or self.checkpoint.tensors[self.embedding]
        if info.dtype not in _FLOATING:
            raise InputModelError(
                f"{info.file}: {at!r} has dtype {info.dtype}: the base is quantised",
                hint="Merge the adapter into the unquantised base.",
            )
        if info.shape != shape:
            raise InputModelError(
                f"{what} is for a tensor of shape {shape}, and {at!r} of the base has {info.shape}",
                hint="It was trained with another vocabulary: resize and save the base first "
                "(resize_token_embeddings)."
                if at in {self.head, self.embedding}
                else "It is an adapter of another model.",
            )

    def with_head(
        self, changes: Mapping[str, Change], copies: set[str | None], adapter: Adapter
    ) -> tuple[dict[str, Change], tuple[str, str] | None]:
        """The changes where one tensor may serve as both embeddings; its new names if it splits."""
        head, embedding = self.head, self.embedding
        if not self.tied:
            return dict(changes), None
        rest = {name: change for name, change in changes.items() if name not in {head, embedding}}
        both = {name: changes.get(name, Change()) for name in (embedding, head)}
        # what replaces the one parameter replaces it for both
        shared = [c.instead for n, c in both.items() if c.instead and n not in copies]
        own = {name: c for name, c in both.items() if c.factors is not None or name in copies}
        for name in both.keys() - copies:
            if shared:
                both[name] = dataclasses.replace(both[name], instead=shared[-1])
        tied = not own or (embedding in own and bool(adapter.config.get("ensure_weight_tying")))
        if tied:
            del both[head]
        changed = {name: change for name, change in both.items() if change != Change()}
        return rest | changed, None if tied else (head, embedding)
