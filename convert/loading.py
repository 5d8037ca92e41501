"""Loading a checkpoint in plain transformers, for the steps that run a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.adapters import AdapterChoice, made_with
from convert.checkpoint.adapter_config import ADAPTER_CONFIG
from convert.checkpoint.index import lacks_metadata
from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.sidecars import gathered_files, tokenizer_folder
from convert.checkpoint.staging import MANIFEST
from convert.config_keys import running_config
from convert.hub import fetch_source
from convert.opening import OpenModel, open_model
from convert.resources import check_ram
from convert.tokenizer_files import has_vocabulary, refusal
from kvpatch.errors import (
    InputModelError,
    KvpatchError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)

__all__ = [
    "Pair",
    "check_device",
    "check_same_tokens",
    "load_as_stored",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "quiet_transformers",
]

# loader buffers and the framework itself, beyond the weights
_OVERHEAD = 1_000_000_000
_GENERATION = "generation_config.json"
_WORDS = "Any text, 3.14 and naïve 北京.\n"


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
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"--device {device}: torch cannot compute on it here") from error


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
    """The model of a folder, in evaluation mode, in its stock class: what a conversion would take.

    Args:
        folder: Checkpoint folder, or one with an adapter alone.
        dtype: Dtype to load in; the checkpoint's own if None.
        device: Where it runs.
        adapter: What to do with an adapter in the folder; it must be given for one beside weights.

    Raises:
        KvpatchError: Those of ``open_model``.
        ResourceError: If it does not fit into memory.
        VerificationError: If transformers does not load it.
    """
    adapted = (folder / ADAPTER_CONFIG).exists()
    with ExitStack() as stack:
        source = fetch_source(str(folder))
        try:
            opened = open_model(source, adapter=adapter, latents=True, allow_pickle=True)
            model = stack.enter_context(opened)
        except UnsupportedModelError:  # transformers may know it all the same
            if adapted:
                raise
            return load_as_stored(folder, dtype=dtype, device=device)
        if not (adapted or model.renamed or lacks_metadata(folder)):
            return _loaded(folder, dtype=dtype, device=device, may_leave_out=True)
        return _loaded(folder, dtype=dtype, device=device, read=model)


def load_as_stored(folder: Path, *, dtype: torch.dtype | None, device: str = "cpu") -> Any:
    """The model of a folder as ``from_pretrained`` alone gives it, which must find every key.

    Args:
        folder: Checkpoint folder.
        dtype: Dtype to load in; the checkpoint's own if None.
        device: Where it runs.

    Raises:
        ResourceError: If it does not fit into memory.
        VerificationError: If a key is missing, unexpected or mismatched.
    """
    return _loaded(folder, dtype=dtype, device=device)


def _loaded(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: str,
    may_leave_out: bool = False,
    read: OpenModel | None = None,
) -> Any:
    """A model by transformers, of the files in its folder or of what is read of it.

    From a folder transformers would load an adapter by peft, whatever is asked for, and would miss
    tensors with the names of a wrapper.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: PLC0415

    if read is None:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    else:
        weights = 2 * sum(info.nbytes for info in read.checkpoint.tensors.values())
    if device == "cpu":
        check_ram(2 * weights + _OVERHEAD, None, what=f"loading {folder}")
    common: dict[str, Any] = {
        "dtype": dtype if dtype is not None else "auto",
        "output_loading_info": True,
    }
    try:
        if read is None:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=running_config(folder),
                trust_remote_code=False,
                local_files_only=True,
                **common,
            )
        else:
            config, checkpoint = running_config(read.checkpoint.config), read.checkpoint
            model, report = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={name: checkpoint.read(name) for name in checkpoint.tensors},
                **common,
            )
            origin = gathered_files(fetch_source(str(folder)).folders).get(_GENERATION)
            if origin is not None:
                model.generation_config = GenerationConfig.from_pretrained(origin)
    except (KvpatchError, MemoryError):
        raise
    except Exception as error:  # what is wrong with a model can make it raise any
        raise VerificationError(
            f"{folder} does not load in transformers: {type(error).__name__}: {error}"
        ) from error
    wrong = {
        key: sorted(map(str, value))
        for key, value in report.items()
        if value and not (may_leave_out and key == "unexpected_keys")
    }
    if wrong:
        raise VerificationError(f"{folder} loads with {wrong}")
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or of the base of an adapter that has none.

    Raises:
        InputModelError: If there is none that transformers can load, with the reason.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    if (folder / ADAPTER_CONFIG).exists():
        folder = tokenizer_folder(fetch_source(str(folder)).folders)
    config = running_config(folder) if (folder / "config.json").is_file() else None
    options = {"config": config, "trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer(_WORDS)  # some damage shows only in use
    except Exception as error:  # bad files make it raise almost any
        raise refusal(folder, error) from error
    # of a folder without any files of a tokenizer some classes make an empty one
    if not has_vocabulary(folder) and not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise refusal(folder, None)
    return tokenizer


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
