"""The model card of a converted checkpoint, from its manifest alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml

from convert.checkpoint.paths import guarded_path
from convert.tables import retrieval_heading, retrieval_tables, task_table
from kvpatch.memory import format_bytes

__all__ = ["inherited_metadata", "kind_of", "render_card"]

_INHERITED = ("license", "license_name", "license_link", "language", "datasets")
# by whether layers share, and the merge
_MERGES = {
    (False, "mean"): "Adjacent KV heads are replaced by their mean, the published conversion "
    "(Ainslie et al., arXiv:2305.13245, section 2.1).",
    (False, "first"): "Of adjacent KV heads the first is kept (Ainslie et al., arXiv:2305.13245, "
    "figure 4).",
    (False, "svd"): "Keys are merged by a query-weighted PCA, Hermitian in each RoPE plane, values "
    "by a PCA under the metric of the output projection; queries and output projection absorb the "
    "maps. Where queries and keys have a norm, keys are averaged instead.",
    (True, "mean"): "Layers that share keys and values (Brandon et al., arXiv:2405.12981) use the "
    "mean of their projections.",
    (True, "first"): "Layers that share keys and values (Brandon et al., arXiv:2405.12981) use the "
    "projections of the first of them.",
    (True, "svd"): "Layers that share keys and values (Brandon et al., arXiv:2405.12981) read the "
    "input of the first of them; what the others read of their own is predicted from it by least "
    "squares, or taken to be the same where nothing was calibrated. Keys are then merged by a "
    "query-weighted PCA, Hermitian in each RoPE plane, values by a PCA under the metric of the "
    "output projection; queries and output projections absorb the maps. Where queries and keys "
    "have a norm, keys are those of the first layer, averaged if there are to be fewer.",
}
_LATENT = (
    "Keys of each RoPE plane are mixed across heads by a complex matrix, which their rotation "
    "commutes with; the components that would lose most without it form one rotary key for all "
    "heads, and the others get the constant that comes nearest to their rotation. What remains of "
    "the keys and all values are read from one latent (DeepSeek-AI, arXiv:2405.04434, section "
    "2.1), the best of its rank under the metric of queries and output projection; constants go "
    "to the output projection's bias. The norm that the class has on the latent, if any, is made "
    "to do nothing."
)
_PER_LAYER = (
    "The budget was divided among the layers so that what they are predicted to lose, of the power "
    "of the residual stream, is least in sum."
)
_SHARED_LATENT = (
    "Adjacent layers share one latent and one rotary key (as Brandon et al., arXiv:2405.12981, do "
    "with keys and values), which read the input of the first of them; what the others read of "
    "their own is predicted from it by least squares, or taken to be the same where nothing was "
    "calibrated. Each has queries and up-projections of its own."
)
_SCALES = (
    "Queries and keys keep their norm exactly: the latent is that of keys without it, and the "
    "factor that the norm comes to is cached for each token."
)
_EXPORTED = (
    "Then it was written for another class that computes the same: factors and constants moved "
    "into other weights, and a norm on the latent was left out or made to do nothing."
)
_TRAINED = "Then its weights were changed, as by training."
_GROUPS = {
    "adjacent": "Neighbouring heads are merged.",
    "similar": "Heads are merged with those that lose least energy together.",
}
_MATCHES = {
    True: "Heads of different layers are paired by what they lose together, unless queries and "
    "keys have a norm.",
    False: "Heads at the same place in different layers are paired.",
}
_REFITS = {
    "q": "Query and key projections were then refitted to the source's attention",
    "o": "Value and output projections were then refitted to the source's outcome",
    "qo": "Query and key projections were then refitted to the source's attention, value and "
    "output projections to its outcome",
}


def inherited_metadata(source: Path) -> dict[str, Any]:
    """What the card takes over from the front matter of the source's card, if it has one.

    Raises:
        ValueError: If the front matter is there but is not YAML with keys and values.
    """
    card = guarded_path(source, "README.md")
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        metadata = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{card.name}: front matter is not YAML ({error})") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{card.name}: front matter has no keys")
    inherited = {key: metadata[key] for key in _INHERITED if key in metadata}
    for key, value in inherited.items():
        words = value if isinstance(value, list) else [value]
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"{card.name}: {key} is neither text nor a list of texts")
    return inherited


def render_card(manifest: Mapping[str, Any]) -> bytes:
    """README.md for the Hub: metadata, sizes, method, measured quality, how to load, recipe."""
    source, recipe, cache = manifest["source"], manifest["recipe"], manifest["kv_cache"]
    exported, shared = recipe["method"] == "export", "share" in recipe
    latent = exported or recipe["method"] == "mla"
    lineage = manifest.get("lineage", [])
    origin = lineage[0]["source"] if lineage else source
    architecture = manifest["architecture"]
    ours = architecture.startswith("Kvpatch")
    kinds = _latent_kinds(shared=shared) if latent else _merged_kinds(cache, shared=shared)
    metadata: dict[str, Any] = {
        **source["metadata"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kvpatch", *kinds, "kv-cache"],
    }
    repository = origin["repository"] or origin.get("base", {}).get("repository")
    if repository:
        metadata |= {"base_model": repository, "base_model_relation": "finetune"}
    metadata |= _datasets(metadata.get("datasets", []), manifest["calibration"])
    template = jinja2.Template(
        resources.files("convert").joinpath("templates/card.md.jinja").read_text("utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    kind, change = kind_of(recipe, cache)
    if exported:
        change = (
            f"from {source['architecture']} to {architecture}, which computes the same ({kind})"
        )
    text: str = template.render(
        front_matter=yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True),
        title=f"{origin['name'].rpartition('/')[2]}, {kind}",
        source=source,
        change=change,
        adapter=_adapter(source, recipe),
        merged=recipe.get("adapter") == "merge",
        held=_held(cache),
        shared=shared,
        sources=cache["kv_source_layers"],
        kv={
            "context": cache["context"],
            "before": format_bytes(cache["bytes_per_token"][0]),
            "after": format_bytes(cache["bytes_per_token"][1]),
            "before_full": format_bytes(cache["bytes_at_context"][0]),
            "after_full": format_bytes(cache["bytes_at_context"][1]),
        },
        method=_history(lineage)
        if exported
        else _method(recipe, scaled="key_scales" in cache.get("latent", {})),
        energy=_energy(manifest),
        caveats=[text[0].upper() + text[1:] for text in manifest.get("caveats", [])],
        dtype=recipe.get("dtype"),
        calibration=manifest["calibration"],
        evaluations=manifest["evaluations"],
        trainings=manifest.get("trainings", []),
        retrieval=[
            (retrieval_heading(found), retrieval_tables(found))
            for found in manifest.get("retrieval", [])
        ],
        tasks=task_table(manifest["tasks"]) if "tasks" in manifest else None,
        pooled=not latent and recipe["merge"] != "svd",
        architecture=architecture,
        ours=ours,
        carried=not ours and architecture != source["architecture"],
        exported=exported,
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False),
    )
    return text.encode()


def _adapter(source: Mapping[str, Any], recipe: Mapping[str, Any]) -> str | None:
    """What was done with the adapter of the source, if it has one, in a sentence."""
    if (base := source.get("base")) is not None:
        at = f" at commit `{base['revision']}`" if base["revision"] else ""
        return f"It is a LoRA adapter of {base['name']}{at}, and was merged into that model first."
    return {
        "merge": "The LoRA adapter that lies beside its weights was merged into them first.",
        "ignore": "The adapter that lies beside its weights was left out.",
    }.get(recipe.get("adapter", ""))


def _datasets(
    inherited: str | Sequence[str], calibration: Mapping[str, Any] | None
) -> dict[str, list[str]]:
    """The source's datasets, and that of the calibration if it is known to be one of the Hub."""
    known = [inherited] if isinstance(inherited, str) else list(inherited)
    found = (calibration or {}).get("dataset")
    known += [found] if found is not None and found not in known else []
    return {"datasets": known} if known else {}


def _latent_kinds(*, shared: bool) -> list[str]:
    return ["mla", "cla"] if shared else ["mla"]


def _merged_kinds(cache: Mapping[str, Any], *, shared: bool) -> list[str]:
    before, after = cache["kv_heads"]
    kinds = ["cla"] if shared else []
    if after < before or not shared:
        kinds.append("mqa" if after == 1 else "gqa")
    return kinds


def _held(cache: Mapping[str, Any]) -> dict[str, Any]:
    """What the cache of a layer holds, before and after."""
    before, after = cache["kv_heads"]
    if "latent" not in cache:
        what, no_place = "KV heads per layer", "this number of KV heads"
        return {"what": what, "before": before, "after": after, "no_place": no_place}
    sizes = cache["latent"]
    scales = f", scales of keys {sizes['key_scales']}" if "key_scales" in sizes else ""
    latent = f"latent of {_span(sizes['rank'])}, rotary key of {_span(sizes['rope_dims'])}{scales}"
    return {
        "what": "cached in a layer",
        "before": latent if before is None else f"{before} KV heads",
        "after": latent,
        "no_place": "latents",
    }


def kind_of(recipe: Mapping[str, Any], cache: Mapping[str, Any]) -> tuple[str, str]:
    """What the result is called, and a phrase that says what was changed.

    Args:
        recipe: Of the manifest.
        cache: Its ``kv_cache``; what it holds of latents or heads.
    """
    if recipe["method"] in {"export", "mla"}:
        return _latent_kind(cache["latent"], recipe)
    return _kind(recipe, *cache["kv_heads"])


def _latent_kind(
    sizes: Mapping[str, int | Sequence[int]], recipe: Mapping[str, Any]
) -> tuple[str, str]:
    rank, rope = _span(sizes["rank"]), _span(sizes["rope_dims"])
    shared = "share" in recipe
    kind = f"MLA {rank}+{rope}" + (f", shared by {recipe['share']} layers" if shared else "")
    whose = "that adjacent layers share" if shared else "per token and layer"
    return kind, (
        f"to multi-head latent attention, with a latent of {rank} and a rotary key of {rope} dims "
        f"{whose} ({kind})"
    )


def _span(sizes: int | Sequence[int]) -> str:
    """A size, or the smallest and the largest of those of the layers."""
    return str(sizes) if isinstance(sizes, int) else f"{min(sizes)} to {max(sizes)}"


def _energy(manifest: Mapping[str, Any]) -> str:
    """What was lost, in a sentence; of an export, what was when its latents were made."""
    recipe, layers = manifest["recipe"], manifest["layers"]
    if recipe["method"] == "export":
        made = (step for step in manifest["lineage"] if step["recipe"]["method"] == "mla")
        return next((_latent_energy(step["layers"]) for step in made), "")
    if recipe["method"] == "mla":
        return _latent_energy(layers)
    return _merged_energy(layers, recipe["merge"])


def _latent_energy(layers: Sequence[Mapping[str, Any]]) -> str:
    rope, latent = (
        _mean_percent(layer[f"lost_energy_{part}"] for layer in layers)
        for part in ("rope", "latent")
    )
    return (
        f"Energy that was lost, as outputs read it, mean over the layers: {rope} of the keys' "
        f"rotation, {latent} of what the latent should hold{_shared_energy(layers)}, before any "
        "refit."
    )


def _shared_energy(layers: Sequence[Mapping[str, Any]]) -> str:
    """What layers lose that read another's latent, and so another's input; nothing if none do."""
    readers = [layer for layer in layers if layer["source"] != layer["layer"]]
    if not readers:
        return ""
    lost = _mean_percent(layer["lost_energy_shared"] for layer in readers)
    return (
        f", and of keys and values in layers that read another's latent {lost}, which that one's "
        "input cannot give"
    )


def _merged_energy(layers: Sequence[Mapping[str, Any]], merge: str) -> str:
    measure = "as queries and outputs read it" if merge == "svd" else "of the weights"
    keys, values = (
        _mean_percent(layer[f"lost_energy_{part}"] for layer in layers) for part in ("k", "v")
    )
    text = (
        f"Energy that merging lost, {measure}, mean over the layers: keys {keys}, values {values}."
    )
    best = _svd_percent(layers)
    if best is None:
        return text
    return (
        f"{text} The best merge of the same key heads (`--merge svd`) would lose {best} of theirs."
    )


def _kind(recipe: Mapping[str, Any], before: int, after: int) -> tuple[str, str]:
    heads = "1 KV head" if after == 1 else f"{after} KV heads"
    if recipe["method"] == "cla":
        kind = f"CLA{recipe['share']} with {heads}"
        fewer = f" and merging {before} KV heads to {after} in each" if after < before else ""
        return kind, f"by sharing keys and values between layers{fewer} ({kind})"
    kind = "MQA" if after == 1 else f"GQA with {heads}"
    return kind, f"from {before} to {after} KV heads per layer ({kind})"


def _method(recipe: Mapping[str, Any], *, scaled: bool) -> list[str]:
    """What was done, in sentences."""
    shared, merge = recipe["method"] == "cla", recipe.get("merge")
    sentences = _latent_method(recipe) if merge is None else [_MERGES[shared, merge]]
    if scaled:
        sentences.append(_SCALES)
    if merge == "svd" and "group" in recipe:
        sentences.append(_GROUPS[recipe["group"]])
    if merge == "svd" and shared:
        sentences.append(_MATCHES[recipe["match"]])
    if recipe["refit"] != "none":
        sentences.append(f"{_REFITS[recipe['refit']]}, by least squares on the calibration text.")
    return sentences


def _latent_method(recipe: Mapping[str, Any]) -> list[str]:
    more = {
        _PER_LAYER: recipe["per_layer"],
        _SHARED_LATENT: "share" in recipe,
    }
    return [_LATENT, *(sentence for sentence, holds in more.items() if holds)]


def _history(lineage: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was done before an export, and the export, in sentences."""
    if not lineage:
        return ["How the source was made is not recorded.", _EXPORTED]
    sentences = []
    for step in lineage:
        exported = step["recipe"]["method"] == "export"
        sentences += [_EXPORTED] if exported else _method(step["recipe"], scaled=False)
        sentences += [_TRAINED] * step["trained"]
    return [*sentences, _EXPORTED]


def _svd_percent(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """What svd would lose, each layer with all that share with it; None if not all is known."""
    found = {
        layer["layer"]: layer["svd_lost_energy_k"]
        for layer in layers
        if "svd_lost_energy_k" in layer
    }
    sources = [layer["source"] for layer in layers]
    return _mean_percent(map(found.__getitem__, sources)) if found.keys() >= set(sources) else None


def _mean_percent(shares: Iterable[float]) -> str:
    return f"{100 * fmean(shares):.1f} %"
