"""Loading a checkpoint in plain transformers, for the steps that run a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.adapters import AdapterChoice, made_with, opened
from convert.checkpoint.adapter_config import ADAPTER_CONFIG
from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.sidecars import gathered_files, tokenizer_folder
from convert.checkpoint.staging import MANIFEST
from convert.config_keys import running_config
from convert.hub import fetch_source
from convert.resources import check_ram
from kvpatch.errors import InputModelError, UsageError, VerificationError

__all__ = [
    "Pair",
    "check_device",
    "check_same_tokens",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "position_limit",
    "quiet_transformers",
]

# loader buffers and the framework itself, beyond the weights
_OVERHEAD = 1_000_000_000
_USUAL_POSITIONS = 2048
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Pair:
    """A model to measure, and the source to compare it with.

    Args:
        name: Folder of the model, for messages.
        tokenizer: Of both.
        model: In evaluation mode.
        source: The same of the source; None if there is nothing to compare with.
    """

    name: str
    tokenizer: Any
    model: Any
    source: Any | None


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UsageError: If there is no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device {device}: no such kind of device") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: there is no CUDA device here")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off stderr; ours say what matters."""
    from transformers.utils import logging as hf_logging  # noqa: PLC0415

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: str = "cpu",
    adapter: AdapterChoice | None = None,
) -> Any:
    """The model of a folder, in evaluation mode, in its stock class.

    Args:
        folder: Checkpoint folder, or one with an adapter alone.
        dtype: Dtype to load in; the checkpoint's own if None.
        device: Where it runs.
        adapter: What to do with an adapter in the folder; it must be given for one beside weights.

    Raises:
        ResourceError: If it does not fit into memory.
        VerificationError: If a key is missing, unexpected or mismatched.
        KvpatchError: Those of ``opened``, if there is an adapter.
    """
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device == "cpu":
        check_ram(2 * weights + _OVERHEAD, None, what=f"loading {folder}")
    adapted = (folder / ADAPTER_CONFIG).exists()
    try:
        model, report = (
            _load_read(folder, adapter, dtype) if adapted else _load_stored(folder, dtype)
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise VerificationError(f"{folder} does not load in transformers: {error}") from error
    wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if wrong:
        raise VerificationError(f"{folder} loads with {wrong}")
    return model.to(device).eval()


def _load_stored(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Mapping[str, Any]]:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    loaded: tuple[Any, Mapping[str, Any]] = AutoModelForCausalLM.from_pretrained(
        folder,
        config=running_config(folder),
        dtype=dtype if dtype is not None else "auto",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    return loaded


def _load_read(
    folder: Path, adapter: AdapterChoice | None, dtype: torch.dtype | None
) -> tuple[Any, Mapping[str, Any]]:
    """As ``_load_stored``, of the tensors as conversions read them.

    From a folder transformers would load an adapter by peft, whatever is asked for.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig  # noqa: PLC0415

    with opened(folder, adapter) as checkpoint:
        config = running_config(checkpoint.config)
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict={name: checkpoint.read(name) for name in checkpoint.tensors},
            dtype=dtype if dtype is not None else "auto",
            output_loading_info=True,
        )
    origin = gathered_files(fetch_source(str(folder)).folders).get(_GENERATION)
    if origin is not None:
        model.generation_config = GenerationConfig.from_pretrained(origin)
    return model, report


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or of the base of an adapter that has none.

    Raises:
        InputModelError: If there is none.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    if (folder / ADAPTER_CONFIG).exists():
        folder = tokenizer_folder(fetch_source(str(folder)).folders)
    config = running_config(folder) if (folder / "config.json").is_file() else None
    try:
        return AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputModelError(f"{folder} has no tokenizer that transformers can load") from error


def check_same_tokens(ours: Any, theirs: Any, folder: Path, against: Path) -> None:
    """Refuse two checkpoints that number their tokens differently.

    Raises:
        InputModelError: If they do.
    """
    if ours.get_vocab() != theirs.get_vocab():
        raise InputModelError(f"{folder} and {against} have different vocabularies")


def load_pair(
    folder: Path,
    against: Path | None,
    *,
    dtype: torch.dtype | None,
    device: str = "cpu",
    adapter: AdapterChoice | None = None,
) -> Pair:
    """A model, and its source if there is one, ready to be measured.

    Args:
        folder: Checkpoint folder of the model.
        against: Of the source.
        dtype: Dtype both run in; float32 on the CPU and the checkpoint's elsewhere if None.
        device: Where they run.
        adapter: What to do with an adapter of the model; of the source, kvpatch.json of the model
            says what was done with its own, and this where there is none.

    Raises:
        UsageError: If there is no such device.
        InputModelError: If there is no tokenizer, or source and model have other tokens.
        ResourceError: If they do not fit into memory.
        VerificationError: If a model does not load.
    """
    check_device(device)
    if dtype is None and device == "cpu":
        dtype = torch.float32
    with quiet_transformers():
        tokenizer = load_tokenizer(folder)
        if against is not None:
            check_same_tokens(tokenizer, load_tokenizer(against), folder, against)
        model = load_model(folder, dtype=dtype, device=device, adapter=adapter)
        source = None
        if against is not None:
            if (folder / MANIFEST).is_file():
                adapter = made_with(read_manifest(folder))
            source = load_model(against, dtype=dtype, device=device, adapter=adapter)
    return Pair(str(folder), tokenizer, model, source)


def position_limit(model: Any) -> int:
    """Most tokens that a model has positions for; 2,048 where its config does not say."""
    return getattr(model.config, "max_position_embeddings", None) or _USUAL_POSITIONS
