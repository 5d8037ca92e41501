"""The model card of a converted checkpoint, from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from convert.checkpoint.paths import guarded_path
from kvpatch.memory import format_bytes

__all__ = ["inherited_metadata", "render_card"]

_INHERITED = ("license", "license_name", "license_link", "language", "datasets")
_METHODS = {
    "mean": "Adjacent KV heads are replaced by their mean, the published conversion "
    "(Ainslie et al., arXiv:2305.13245, section 2.1).",
    "svd": "Keys are merged by a query-weighted Hermitian PCA in each RoPE plane, values by a PCA "
    "under the metric of the output projection; queries and output projection absorb the maps.",
    "first": "Of adjacent KV heads the first is kept (Ainslie et al., arXiv:2305.13245, figure 4).",
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
    after = cache["kv_heads"][1]
    kind = "MQA" if after == 1 else f"GQA with {after} KV heads"
    layers = manifest["layers"]
    metadata: dict[str, Any] = {
        **source["metadata"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kvpatch", "mqa" if after == 1 else "gqa", "kv-cache"],
    }
    if source["repository"]:
        metadata |= {"base_model": source["repository"], "base_model_relation": "finetune"}
    template = jinja2.Template(
        resources.files("convert").joinpath("templates/card.md.jinja").read_text("utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    text: str = template.render(
        front_matter=yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True),
        title=f"{source['name'].rpartition('/')[2]}, {kind}",
        source=source,
        kind=kind,
        heads={"before": cache["kv_heads"][0], "after": after},
        kv={
            "context": cache["context"],
            "before": format_bytes(cache["bytes_per_token"][0]),
            "after": format_bytes(cache["bytes_per_token"][1]),
            "before_full": format_bytes(cache["bytes_at_context"][0]),
            "after_full": format_bytes(cache["bytes_at_context"][1]),
        },
        method=_METHODS[recipe["merge"]],
        energy="as queries and outputs read it" if recipe["merge"] == "svd" else "of the weights",
        lost={part: _mean_percent(layers, f"lost_energy_{part}") for part in ("k", "v")},
        dtype=recipe.get("dtype"),
        evaluations=manifest["evaluations"],
        architecture=manifest["architecture"],
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False),
    )
    return text.encode()


def _mean_percent(layers: Sequence[Mapping[str, float]], key: str) -> str:
    return f"{100 * sum(layer[key] for layer in layers) / len(layers):.1f} %"
