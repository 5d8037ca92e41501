"""Checking a converted checkpoint: files, shapes, numbers, loading, cache, and its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from convert.adapters import made_with
from convert.checkpoint.manifest import changed_files, read_manifest
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.staging import MANIFEST
from convert.facts import ModelFacts, has_latents, read_facts
from convert.families import tensor_names
from convert.families.naming import layer_and_rest
from convert.hub import Source, fetch_source
from convert.loading import load_as_stored, load_tokenizer, quiet_transformers
from convert.opening import OpenModel, open_model
from convert.targets.deepseek import deepseek_class
from kvpatch.errors import InputModelError, KvpatchError, VerificationError
from kvpatch.memory import KVCache, latent_cache

__all__ = ["PROBE", "Check", "cache_bytes", "planned_cache", "verify_checkpoint"]

PROBE = (
    "The quick brown fox — naïve café, 北京 42 — jumps over 3.14 lazy dogs.\n\tif x == 0: return\n"
)
_PROBE_TOKENS = 24
_CACHE_TOLERANCE = 1e-4  # of the largest logit, in float32: rounding order differs, not values


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of ``verify``."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str


def verify_checkpoint(
    folder: Path,
    source: Path | None = None,
    *,
    run: bool = True,
    progress: Callable[[str], None] | None = None,
) -> list[Check]:
    """Check a converted checkpoint.

    Args:
        folder: The result of a conversion.
        source: What it was made from; compares tokenizer and untouched tensors with it.
        run: Load the model and run it; else only files are checked.
        progress: Called with the name of each check as it begins.

    Returns:
        All checks with their outcome; a failed check does not stop the others.

    Raises:
        InputModelError: If a folder does not exist.
    """
    for path in filter(None, (folder, source)):
        if not path.is_dir():
            raise InputModelError(f"{path} is not a folder")
    steps: list[tuple[str, Callable[[], str]]] = [
        ("hashes", lambda: _hashes(folder)),
        ("shapes", lambda: _shapes(folder)),
        ("finite", lambda: _finite(folder)),
    ]
    if source is not None:
        origin = source
        steps += [
            ("source", lambda: _source(folder, origin)),
            ("tokens", lambda: _tokens(folder, origin)),
            ("untouched tensors", lambda: _untouched(folder, origin)),
        ]
    if run:
        runner = _Runner(folder)
        steps += [
            ("loading", runner.loading),
            ("cached decoding", runner.cached),
            ("cache size", runner.size),
        ]
    checks = []
    for name, step in steps:
        if progress is not None:
            progress(name)
        try:
            with quiet_transformers():
                checks.append(Check(name, "ok", step()))
        except _SkippedError as skipped:
            checks.append(Check(name, "skipped", str(skipped)))
        except KvpatchError as error:
            checks.append(Check(name, "failed", error.message))
    return checks


class _SkippedError(Exception):
    """A check has nothing to check."""


def _hashes(folder: Path) -> str:
    if not (folder / MANIFEST).is_file():
        raise _SkippedError(f"no {MANIFEST}: not made by kvpatch")
    manifest = read_manifest(folder)
    changes = changed_files(folder, manifest)
    if changes:
        raise VerificationError("; ".join(changes))
    return f"{len(manifest['files'])} files as recorded"


def _shapes(folder: Path) -> str:
    with open_model(Source(folder, folder.name), adapter="ignore", latents=True) as model:
        if model.left_out:
            unread = ", ".join(repr(info.name) for info in model.left_out[:5])
            raise VerificationError(f"the class does not read {unread}")
        held = f"{model.facts.geometry.kv_heads} KV heads" if model.latents is None else "latents"
        return f"{len(model.checkpoint.tensors)} tensors, {held}"


def _finite(folder: Path) -> str:
    with Checkpoint(folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if not info.dtype.is_floating_point:
                continue
            for chunk in checkpoint.chunks(name):
                if not torch.isfinite(torch.frombuffer(chunk, dtype=info.dtype)).all():
                    raise VerificationError(f"{name!r} holds NaN or infinity")
    return "no NaN, no infinity"


def _source(folder: Path, source: Path) -> str:
    recorded = read_manifest(folder)["source"]["files"]
    with _opened(folder, source) as model:
        checkpoint = model.checkpoint
        found = {file: checkpoint.sha256(file) for file in checkpoint.files}
    expected = {file: record["sha256"] for file, record in recorded.items()}
    if found != expected:
        wrong = sorted(f for f in found.keys() | expected.keys() if found.get(f) != expected.get(f))
        raise VerificationError(f"this is not the source it was made from: {', '.join(wrong)}")
    return f"{len(found)} source files as recorded"


@contextmanager
def _opened(folder: Path, source: Path) -> Iterator[OpenModel]:
    """The source of a result, with its adapter merged or left out as it was then."""
    adapter = made_with(read_manifest(folder))
    origin = fetch_source(str(source), allow_pickle=True)
    with open_model(origin, adapter=adapter, latents=True, allow_pickle=True) as model:
        yield model


def _tokens(folder: Path, source: Path) -> str:
    if not any(any(path.glob("tokenizer*")) for path in (folder, source)):
        raise _SkippedError("neither has a tokenizer")
    try:
        source_tokenizer = load_tokenizer(source)
    except InputModelError as error:
        raise _SkippedError(error.message) from error
    before, after = (
        tokenizer(PROBE)["input_ids"] for tokenizer in (source_tokenizer, load_tokenizer(folder))
    )
    if before != after:
        raise VerificationError(f"the probe text gives other token ids: {before} and {after}")
    return f"{len(before)} equal token ids"


def _untouched(folder: Path, source: Path) -> str:
    with (
        Checkpoint(folder) as new,
        _opened(folder, source) as model,
    ):
        old, facts, latents = model.checkpoint, model.facts, model.latents
        if latents is not None:  # an export
            converted = {name for layer in range(facts.layers) for name in latents.names(layer)}
        else:
            parts = read_manifest(folder)["converted"]
            converted = {
                name
                for layer in range(facts.layers)
                for name in tensor_names(facts.family, facts.geometry, layer, parts)
            }
        if read_manifest(folder).get("trainings"):
            raise _SkippedError("the model was trained afterwards")
        if read_manifest(folder)["recipe"].get("dtype"):
            raise _SkippedError("all weights were cast")
        copied = _copied(facts, new.config)
        same = [
            (name, before)
            for before, info in old.tensors.items()
            if before not in converted
            for name in copied(before)
            if name in new.tensors
            and (info.dtype, info.shape) == (new.tensors[name].dtype, new.tensors[name].shape)
        ]
        for name, before in same:
            pairs = zip(new.chunks(name), old.chunks(before), strict=True)
            if any(bytes(a) != bytes(b) for a, b in pairs):
                raise VerificationError(f"{name!r} differs from the source, but was not converted")
        return f"{len(same)} of {len(new.tensors)} tensors are the source's, byte for byte"


def _copied(facts: ModelFacts, config: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """What a tensor of the source is called in the result, if its bytes are copied.

    DeepSeek's class takes up constant factors of the source's block in its weights; others have
    every tensor outside the attention as it was.

    Args:
        facts: The source.
        config: The result's config.json.
    """
    target = None
    if config["model_type"] in ("deepseek_v3", "youtu"):
        # the sizes of the latent change nothing outside the attention
        target = deepseek_class(
            facts,
            rank=config["kv_lora_rank"],
            planes=(0,),
            nope_dim=config["qk_nope_head_dim"],
            arch=config["model_type"],
            inert="constant" if config["attention_bias"] else "epsilon",
            dtype=None,
            largest=None,
        )
    if target is None:
        return lambda name: [name]
    rewritten = target

    def copied(name: str) -> list[str]:
        place = layer_and_rest(name, facts.family)
        if place is not None and place[1] in rewritten.folds:
            return []
        return [rewrite.name for rewrite in rewritten.rewrites(name) if rewrite.transform is None]

    return copied


class _Runner:
    """Checks that run the model; it is loaded once, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model: Any = None
        self._cache: Any = None

    def loading(self) -> str:
        """Load it with no key missing, unexpected or mismatched."""
        self._model = load_as_stored(self._folder, dtype=torch.float32)
        return f"{type(self._model).__name__}, no key missing, unexpected or mismatched"

    @torch.no_grad()
    def cached(self) -> str:
        """Decode token by token with a cache and compare with one full forward."""
        model, ids = self._loaded(), self._ids()
        full = model(ids, use_cache=False).logits
        cache, steps = None, []
        for token in torch.split(ids, 1, dim=1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        self._cache = cache
        if not torch.isfinite(full).all():
            raise VerificationError("its logits are NaN or infinite")
        error = float((torch.cat(steps, 1) - full).abs().max() / full.abs().max())
        if not error <= _CACHE_TOLERANCE and not error <= self._rounding(ids, full):
            raise VerificationError(f"logits with a cache differ by {error:.1e} of the largest")
        return f"{ids.shape[1]} tokens, largest difference {error:.1e} of the largest logit"

    def _rounding(self, ids: torch.Tensor, full: torch.Tensor) -> float:
        """What rounding may change in the logits, of the largest, at most a hundredth.

        A model that was made much worse amplifies it. So its embeddings are rounded otherwise, and
        every layer adds about as much as they do.
        """
        model = self._loaded()
        embedded = model.get_input_embeddings()(ids)
        noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
        other = embedded * (1 + torch.finfo(embedded.dtype).eps * noise)
        changed = model(inputs_embeds=other, use_cache=False).logits
        once = float((changed - full).abs().max() / full.abs().max())
        layers: int = model.config.get_text_config().num_hidden_layers
        return min(1e-2, layers * once)

    def size(self) -> str:
        """Count the bytes in the cache and compare with the plan."""
        if self._cache is None:
            raise _SkippedError("the model did not run")
        with Checkpoint(self._folder) as checkpoint:
            cache = planned_cache(checkpoint.config)
        tokens = self._ids().shape[1]
        if any(layer.window is not None and layer.window <= tokens for layer in cache.layers):
            raise _SkippedError("windows are shorter than the probe")
        expected = cache.size(tokens) // cache.bytes_per_value * 4
        held = cache_bytes(self._cache)
        if held != expected:
            raise VerificationError(f"the cache holds {held:,} bytes, planned were {expected:,}")
        return f"{held:,} bytes for {tokens} tokens in float32, as planned"

    def _loaded(self) -> Any:
        if self._model is None:
            raise _SkippedError("the model did not load")
        return self._model

    def _ids(self) -> torch.Tensor:
        vocabulary: int = self._loaded().config.vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=generator)


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a transformers cache holds."""

    def tensors() -> Iterator[torch.Tensor]:
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None:
                    yield tensor

    return sum(tensor.numel() * tensor.element_size() for tensor in tensors())


def planned_cache(config: Mapping[str, Any]) -> KVCache:
    """The cache that a config.json describes.

    Raises:
        InputModelError: If kvpatch does not know such models.
    """
    if not has_latents(config):
        return read_facts(config).cache()
    planes = config.get("kv_rope_planes")
    if planes is None:
        sizes = {"rank": config["kv_lora_rank"], "rope_dim": config["qk_rope_head_dim"]}
        return latent_cache(layers=config["num_hidden_layers"], **sizes)
    facts = read_facts(config)
    return latent_cache(
        layers=facts.layers,
        rank=config["kv_lora_rank"],
        rope_dim=[2 * len(pairs) for pairs in planes],
        scales=facts.key_scales,
        sources=config.get("kv_source_layers"),
        windows=facts.windows if facts.family.windows.cached else None,
    )
