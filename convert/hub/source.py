"""Sources: a local folder, or a repository on the Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from convert.checkpoint.paths import hub_snapshot
from convert.checkpoint.safetensors_header import header_bytes
from convert.checkpoint.sidecars import DOWNLOADED, NOT_DOWNLOADED
from convert.hub.client import hub_errors, quiet_client
from convert.signals import at_hard_end
from kvpatch.errors import InputModelError, UsageError

__all__ = ["REPOSITORY", "Source", "fetch_config", "fetch_source", "opened_source", "user_path"]

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = ("*.bin", "*.bin.index.json")
_WEIGHTS = ".safetensors"
_FIRST_BYTES = 1 << 17  # of a weight file; most headers are shorter


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder and where it comes from.

    Args:
        path: The folder.
        name: Repository name, or name of the folder; never an absolute path.
        repository: ``org/name`` if it comes from the Hub.
        revision: Commit if it comes from the Hub.
        sizes: Bytes of each weight file, where only the headers of these are in the folder.
    """

    path: Path
    name: str
    repository: str | None = None
    revision: str | None = None
    sizes: Mapping[str, int] | None = None


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
    with hub_errors(repository, revision):
        files = _files(repository, revision)
        patterns = list(DOWNLOADED)
        if files and not any(file.endswith(_WEIGHTS) for file in files) and allow_pickle:
            patterns += _PICKLED
        path = _snapshot(repository, revision, patterns, NOT_DOWNLOADED)
    return Source(path, repository, repository, path.name)


@contextmanager
def opened_source(
    text: str, *, revision: str | None = None, allow_pickle: bool = False, whole: bool = True
) -> Iterator[Source]:
    """As ``fetch_source``; unless ``whole``, weights are not downloaded, only their headers.

    These are read by ranged requests and kept while the context lasts. What has no headers of its
    own (pickled weights), and what is asked for without network, is fetched whole.
    """
    local, repository, at = _parse(text, revision)
    names: list[str] = []
    if local is None and not whole:
        with hub_errors(repository, at):
            names = [name for name in _files(repository, at) if name.endswith(_WEIGHTS)]
    if not names:
        yield local or fetch_source(text, revision=revision, allow_pickle=allow_pickle)
        return
    with (
        tempfile.TemporaryDirectory(prefix="kvpatch-headers-") as folder,
        at_hard_end(lambda _: shutil.rmtree(folder, ignore_errors=True)),
    ):
        with hub_errors(repository, at):
            source = _with_headers(repository, at, Path(folder) / "model")
        yield source


def fetch_config(text: str, *, revision: str | None = None) -> Source:
    """As ``fetch_source``, but of a Hub repository only config.json is downloaded."""
    local, repository, revision = _parse(text, revision)
    if local is not None:
        return local
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    with hub_errors(repository, revision):
        _files(repository, revision)
        file = Path(hf_hub_download(repository, "config.json", revision=revision))
    return Source(file.parent, repository, repository, file.parent.name)


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
    if path.exists() or not REPOSITORY.fullmatch(repository) or text.startswith((".", "/", "~")):
        raise InputModelError(
            f"{text} is neither a folder nor a repository of the form org/name[@revision]"
        )
    return None, repository, tail or revision


def _snapshot(
    repository: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str]
) -> Path:
    """Folder in the cache, named by the commit, with the files of these patterns."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    with quiet_client():
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
            )
        )


def _with_headers(repository: str, revision: str | None, folder: Path) -> Source:
    """A copy of the small files of a repository, and the headers of its weights beside them."""
    from huggingface_hub import HfApi, HfFileSystem, RepoFile  # noqa: PLC0415

    snapshot = _snapshot(repository, revision, DOWNLOADED, (*NOT_DOWNLOADED, f"*{_WEIGHTS}"))
    commit = snapshot.name
    sizes = {
        file.path: file.size
        for file in HfApi().list_repo_tree(repository, revision=commit)
        if isinstance(file, RepoFile)
        and file.path.endswith(_WEIGHTS)
        and not any(fnmatch(file.path, pattern) for pattern in NOT_DOWNLOADED)
    }
    if all((snapshot / name).is_file() for name in sizes):
        return Source(snapshot, repository, repository, commit)
    shutil.copytree(snapshot, folder, ignore=shutil.ignore_patterns(f"*{_WEIGHTS}"))
    remote = HfFileSystem()
    for name, size in sizes.items():
        path = f"{repository}/{name}"
        with remote.open(path, revision=commit, block_size=_FIRST_BYTES) as stream:
            (folder / name).write_bytes(header_bytes(stream, size, name))
    return Source(folder, repository, repository, commit, sizes)


def _files(repository: str, revision: str | None) -> list[str]:
    """Names of a repository's files; none without network, where only what is cached can be used.

    Asking first makes a Hub that refuses or fails an error, not a fall back to an old cache.
    """
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return []
    info = HfApi().model_info(repository, revision=revision)
    return [sibling.rfilename for sibling in info.siblings or []]
