"""Sources: a local folder, or a repository on the Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from convert.checkpoint.adapter_config import ADAPTER_CONFIG, base_of, is_alone
from convert.checkpoint.paths import hub_snapshot
from convert.checkpoint.safetensors_header import header_bytes
from convert.checkpoint.sidecars import DOWNLOADED, NOT_DOWNLOADED
from convert.hub.client import hub_errors, quiet_client
from convert.signals import at_hard_end
from kvpatch.errors import InputModelError, UsageError

__all__ = [
    "REPOSITORY",
    "Source",
    "fetch_config",
    "fetch_source",
    "fetched",
    "opened_source",
    "user_path",
]

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = ("*.bin", "*.bin.index.json")
_WEIGHTS = ".safetensors"
_FIRST_BYTES = 1 << 17  # of a weight file; most headers are shorter
Base = tuple[str, str | None]  # folder or repository, and revision


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder and where it comes from.

    Args:
        path: The folder.
        name: Repository name, or name of the folder; never an absolute path.
        repository: ``org/name`` if it comes from the Hub.
        revision: Commit if it comes from the Hub.
        sizes: Bytes of each weight file, where only the headers of these are in the folder.
        base: What has the weights, where the folder holds an adapter alone.
    """

    path: Path
    name: str
    repository: str | None = None
    revision: str | None = None
    sizes: Mapping[str, int] | None = None
    base: Source | None = None

    @property
    def folders(self) -> list[Path]:
        """Where its files are: those of its base, if it has one, and its own, which go first."""
        return [self.path] if self.base is None else [self.base.path, self.path]

    @property
    def whole(self) -> bool:
        """Whether all weights are here, and not only their headers."""
        return self.sizes is None and (self.base is None or self.base.whole)


def fetch_source(text: str, *, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """The checkpoint folder that ``text`` names, downloaded if it is on the Hub.

    With a folder that holds an adapter alone comes the base that its config names.

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
    source, base = _fetched(text, revision, allow_pickle)
    return source if base is None else replace(source, base=_fetched(*base, allow_pickle)[0])


def fetched(source: Source) -> Source:
    """A source of whose weights only headers are here, downloaded whole.

    Raises:
        NetworkError: As of ``fetch_source``.
    """
    if source.base is not None:
        return replace(source, base=source.base if source.base.whole else fetched(source.base))
    assert source.repository is not None, "what is local is whole"
    return fetch_source(source.repository, revision=source.revision)


def _fetched(text: str, revision: str | None, allow_pickle: bool) -> tuple[Source, Base | None]:
    """What ``text`` names, and if it is an adapter alone, what that one's base is."""
    local, repository, revision = _parse(text, revision)
    if local is not None:
        return local, _base(local, ())
    with hub_errors(repository, revision):
        files = _files(repository, revision)
        patterns = list(DOWNLOADED)
        if files and not any(file.endswith(_WEIGHTS) for file in files) and allow_pickle:
            patterns += _PICKLED
        path = _snapshot(repository, revision, patterns, NOT_DOWNLOADED)
    source = Source(path, repository, repository, path.name)
    return source, _base(source, files)


def _base(source: Source, files: Sequence[str]) -> Base | None:
    """The base of an adapter alone; None for a model.

    Args:
        source: What was fetched, which may be a part.
        files: Names of all files there are; those of the folder if none are given.
    """
    names = files or [path.name for path in source.path.iterdir()]
    if not is_alone(names):
        return None
    base, revision = base_of(source.path)
    if Path(base).is_dir():
        return base, None
    if not _names_repository(base):
        raise InputModelError(
            f"{source.name} is an adapter without weights, and its base {base!r} is neither a "
            "folder here nor a repository of the form org/name",
            hint=f"Correct base_model_name_or_path in {ADAPTER_CONFIG}, or put the files of the "
            "adapter beside the weights of its base.",
        )
    return base, revision


@contextmanager
def opened_source(
    text: str, *, revision: str | None = None, allow_pickle: bool = False, whole: bool = True
) -> Iterator[Source]:
    """As ``fetch_source``; unless ``whole``, weights are not downloaded, only their headers.

    These are read by ranged requests and kept while the context lasts. What has no headers of its
    own (pickled weights), and what is asked for without network, is fetched whole.
    """
    with _opened(text, revision, allow_pickle, whole) as (source, base):
        if base is None:
            yield source
            return
        # which opening the model refuses if it is an adapter itself
        with _opened(*base, allow_pickle, whole) as (opened, _):
            yield replace(source, base=opened)


@contextmanager
def _opened(
    text: str, revision: str | None, allow_pickle: bool, whole: bool
) -> Iterator[tuple[Source, Base | None]]:
    """As ``_fetched``, with the weights or their headers as of ``opened_source``."""
    local, repository, at = _parse(text, revision)
    names: list[str] = []
    if local is None and not whole:
        with hub_errors(repository, at):
            files = _files(repository, at)
        names = [name for name in files if name.endswith(_WEIGHTS) and not is_alone(files)]
    if not names:
        yield _fetched(text, revision, allow_pickle)
        return
    with (
        tempfile.TemporaryDirectory(prefix="kvpatch-headers-") as folder,
        at_hard_end(lambda _: shutil.rmtree(folder, ignore_errors=True)),
    ):
        with hub_errors(repository, at):
            source = _with_headers(repository, at, Path(folder) / "model")
        yield source, None


def fetch_config(text: str, *, revision: str | None = None) -> Source:
    """As ``fetch_source``, but of a Hub repository only its configs are downloaded."""
    source, base = _fetched_config(text, revision)
    return source if base is None else replace(source, base=_fetched_config(*base)[0])


def _fetched_config(text: str, revision: str | None) -> tuple[Source, Base | None]:
    local, repository, revision = _parse(text, revision)
    if local is not None:
        return local, _base(local, ())
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    with hub_errors(repository, revision):
        files = _files(repository, revision)
        adapter = [ADAPTER_CONFIG] if ADAPTER_CONFIG in files else []
        for name in adapter if is_alone(files) else ("config.json", *adapter):
            file = Path(hf_hub_download(repository, name, revision=revision))
    source = Source(file.parent, repository, repository, file.parent.name)
    return source, _base(source, files or ["config.json"])


def user_path(text: str) -> Path:
    """A path as a user wrote it, with ``~`` resolved.

    Raises:
        UsageError: If no file can have that name.
    """
    try:
        path = Path(text).expanduser()
        path.lstat()  # unlike exists() it tells a name that cannot be from one that is not there
    except (FileNotFoundError, NotADirectoryError):
        return path
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
    if path.exists() or not _names_repository(repository):
        raise InputModelError(
            f"{text} is neither a folder nor a repository of the form org/name[@revision]"
        )
    return None, repository, tail or revision


def _names_repository(text: str) -> bool:
    return REPOSITORY.fullmatch(text) is not None and not text.startswith((".", "/", "~"))


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
