"""Sources: a local folder, or a repository on the Hub. The only module that uses the network."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint.paths import hub_snapshot
from convert.checkpoint.sidecars import DOWNLOADED, NOT_DOWNLOADED
from kvpatch.errors import InputModelError, NetworkError, UsageError

__all__ = ["Source", "fetch_config", "fetch_source", "user_path"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests"})
_PICKLED = ("*.bin", "*.bin.index.json")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder and where it comes from.

    Args:
        path: The folder.
        name: Repository name, or name of the folder; never an absolute path.
        repository: ``org/name`` if it comes from the Hub.
        revision: Commit if it comes from the Hub.
    """

    path: Path
    name: str
    repository: str | None = None
    revision: str | None = None


def fetch_source(text: str, *, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """The checkpoint folder that ``text`` names, downloaded if it is on the Hub.

    All files are of one commit, even if the branch moves meanwhile: huggingface_hub resolves the
    revision once, and the snapshot's folder is named by the commit.

    Args:
        text: Folder, or ``org/name[@revision]``.
        revision: Branch, tag or commit; not together with ``@``.
        allow_pickle: Download ``.bin`` files where there are no others.

    Raises:
        InputModelError: If there is no such folder.
        NetworkError: If the Hub has no such repository or revision, or refuses, or cannot be
            reached.
    """
    local, repository, revision = _parse(text, revision)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    with _hub_errors(repository, revision):
        files = _files(repository, revision)
        patterns = list(DOWNLOADED)
        if files and not any(file.endswith(".safetensors") for file in files) and allow_pickle:
            patterns += _PICKLED
        with _bars_on_terminals_only():
            path = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=list(NOT_DOWNLOADED),
                )
            )
    return Source(path, repository, repository, path.name)


def fetch_config(text: str, *, revision: str | None = None) -> Source:
    """As ``fetch_source``, but of a Hub repository only config.json is downloaded."""
    local, repository, revision = _parse(text, revision)
    if local is not None:
        return local
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    with _hub_errors(repository, revision):
        _files(repository, revision)
        file = Path(hf_hub_download(repository, "config.json", revision=revision))
    return Source(file.parent, repository, repository, file.parent.name)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the Hub's progress bars out of logs, as ours are."""
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def user_path(text: str) -> Path:
    """A path as a user wrote it, with ``~`` resolved.

    Raises:
        UsageError: If no file can have that name.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{text!r} cannot be used as a path: {error}") from error
    return path


def _parse(text: str, revision: str | None) -> tuple[Source | None, str, str | None]:
    path = user_path(text)
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"--revision {revision} is for the Hub, but {text} is a local folder")
        snapshot = hub_snapshot(path)
        if snapshot is not None:
            return Source(path, snapshot[0], *snapshot), "", None
        return Source(path, path.resolve().name), "", None
    repository, at, tail = text.partition("@")
    if at and revision is not None:
        raise UsageError(f"both {text} and --revision {revision} name a revision; give one")
    if path.exists() or not _REPOSITORY.fullmatch(repository) or text.startswith((".", "/", "~")):
        raise InputModelError(
            f"{text} is neither a folder nor a repository of the form org/name[@revision]"
        )
    return None, repository, tail or revision


def _files(repository: str, revision: str | None) -> list[str]:
    """Names of a repository's files; none without network, where only what is cached can be used.

    Asking first makes a Hub that refuses or fails an error, not a fall back to an old cache.
    """
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return []
    info = HfApi().model_info(repository, revision=revision)
    return [sibling.rfilename for sibling in info.siblings or []]


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn every way in which the Hub can fail into one line with a next step."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError as error:
        raise NetworkError(
            f"{repository} is gated",
            hint=f"Accept its terms at https://huggingface.co/{repository}, then `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NetworkError(
            f"the Hub has no model {repository}, or it is private",
            hint="Check the name; for a private model run `hf auth login`.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NetworkError(
            f"{repository} has no revision {revision or 'main'!r}",
            hint=f"Its branches and tags are at https://huggingface.co/{repository}/tree/main.",
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise NetworkError(
                f"{repository} is not in the local cache, and the Hub cannot be reached",
                hint=_offline_hint(),
            ) from error
        raise InputModelError(f"{repository} has no config.json at {revision or 'main'}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "no status")
        hint = "Wait a while and run again; finished downloads are kept."
        if status in {401, 403}:
            hint = "Check your access token: run `hf auth login`."
        raise NetworkError(f"the Hub answered {status} for {repository}", hint=hint) from error
    except Exception as error:
        # HTTP clients differ between versions of huggingface_hub, and so do their errors
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        raise NetworkError(
            f"the Hub cannot be reached for {repository}: {type(error).__name__}",
            hint=_offline_hint(),
        ) from error


def _offline_hint() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}:
        return "HF_HUB_OFFLINE is set; unset it, or download the model first."
    return "Check the network connection, or use a local folder."
