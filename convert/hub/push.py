"""A converted checkpoint, published on the Hub by a pull request that is checked before merging.

The repository shows nothing of a push until all of it is there and is what ``kvpatch.json`` says:
files go to the ref of a pull request, their sizes and hashes are read back from the Hub, and then
the request is merged. Its title carries the hash of the manifest, by which a second run finds it
and uploads only what is missing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from convert.checkpoint.manifest import changed_files, read_manifest
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.staging import MANIFEST
from convert.hub.client import hub_errors, quiet_client
from convert.hub.source import REPOSITORY
from kvpatch.errors import NetworkError, UsageError, VerificationError

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

__all__ = ["Pushed", "push_folder"]

Progress = Callable[[str, int, int], None]
Tree = Mapping[str, "RepoFile"]

# weights beside ours and indexes that name other weights would be loaded, or contradict ours; the
# Hub shows scores of other weights as if they were of ours
_STALE = (
    "*.safetensors",
    "*.bin",
    "*.safetensors.index.json",
    "*.bin.index.json",
    ".eval_results/*",
)


@dataclass(frozen=True, slots=True)
class Pushed:
    """How a repository stands after a push.

    Args:
        repository: ``org/name``.
        branch: The branch that holds the checkpoint.
        commit: Its commit.
        pull_request: Number of the pull request that brought it; None if all was there before.
        uploaded: Files that this run uploaded.
        url: Where to look at it.
    """

    repository: str
    branch: str
    commit: str
    pull_request: int | None
    uploaded: int
    url: str


@dataclass(frozen=True, slots=True)
class _LocalFile:
    """A file to push, as the manifest states it."""

    path: Path
    size: int
    sha256: str

    def is_at(self, remote: RepoFile | None) -> bool:
        """Whether the Hub holds this very file; of a small one it tells git's hash alone."""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return (remote.lfs.size, remote.lfs.sha256) == (self.size, self.sha256)
        content = self.path.read_bytes()
        named = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        ours = hashlib.sha256(content).hexdigest() == self.sha256
        return ours and named.hexdigest() == remote.blob_id


@dataclass(frozen=True, slots=True)
class _Push:
    """One push: the client, where to, and what."""

    api: HfApi
    repository: str
    branch: str
    title: str
    files: Mapping[str, _LocalFile]

    def tree(self, revision: str) -> Tree:
        """All files of a revision, by name."""
        from huggingface_hub import RepoFile  # noqa: PLC0415

        entries = self.api.list_repo_tree(self.repository, revision=revision, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def missing(self, tree: Tree) -> list[str]:
        """Our files that a tree does not hold, or holds otherwise."""
        return [name for name, file in self.files.items() if not file.is_at(tree.get(name))]

    def stale(self, tree: Tree) -> list[str]:
        """Weights in a tree that are not ours."""
        return sorted(
            name
            for name in tree.keys() - self.files.keys()
            if any(fnmatch(name, pattern) for pattern in _STALE)
        )

    def differs(self, tree: Tree) -> bool:
        """Whether a branch with this tree has to be changed."""
        return bool(self.missing(tree) or self.stale(tree))

    def commit(self, names: Iterable[str], deleted: Iterable[str], revision: str | None) -> int:
        """Commit to a revision, or to a new pull request; number of that, else 0.

        Raises:
            NetworkError: If the Hub refuses a file, or the card's metadata.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415

        added = [CommitOperationAdd(name, str(self.files[name].path)) for name in names]
        try:
            done = self.api.create_commit(
                self.repository,
                [*added, *(CommitOperationDelete(name) for name in deleted)],
                commit_message=self.title,
                revision=revision,
                create_pr=revision is None,
            )
        except ValueError as error:
            if isinstance(error, OSError):  # an answer without words of its own
                raise
            words = " ".join(str(error).split())
            raise NetworkError(f"the Hub refuses files for {self.repository}: {words}") from error
        return done.pr_num or 0

    def publish(self, number: int | None) -> None:
        """Bring to the branch what a pull request holds, or main if there is none.

        The Hub merges to main alone. To another branch the same files go in one commit; their
        contents are on the Hub already.
        """
        if self.branch == "main":
            assert number is not None
            self.api.merge_pull_request(self.repository, number)
            return
        if number is not None:
            self.api.change_discussion_status(self.repository, number, "closed")
        tree = self.tree(self.branch)
        self.commit(self.missing(tree), self.stale(tree), self.branch)


def push_folder(
    folder: Path,
    repository: str,
    *,
    public: bool = False,
    branch: str = "main",
    message: str = "Upload by kvpatch",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Pushed:
    """Publish a converted checkpoint; afterwards the branch holds all of it, or what it held.

    Only the files that the manifest names are pushed, and the manifest. The access token is the
    one of ``hf auth login`` or of HF_TOKEN.

    Args:
        folder: The result of a conversion.
        repository: ``org/name``; made if it does not exist.
        public: Make it public; else it is private. An existing one stays as it is.
        branch: Branch to publish on; made from main if it does not exist.
        message: Title of the pull request and its commits.
        progress: Called with what is being done, how much of it just was, and how much it is.
        warn: Called with each warning.

    Raises:
        UsageError: If the repository's name is none.
        InputModelError: If the folder was not made by kvpatch.
        VerificationError: If the folder is not what its manifest says, or the Hub's copy is not;
            then nothing is merged.
        NetworkError: If the Hub refuses, fails or cannot be reached; the same call continues.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"{repository} is not a repository of the form org/name")
    if not message.strip() or not branch.strip():
        raise UsageError("--message and --revision must not be empty")
    files = _local_files(folder)
    with hub_errors(repository, branch), quiet_client(), _forwarded(warn):
        from huggingface_hub import HfApi  # noqa: PLC0415

        api = HfApi()
        author = api.whoami()["name"]
        _open_repository(api, repository, public=public, warn=warn)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        title = f"{message.strip()} ({files[MANIFEST].sha256[:12]})"
        push = _Push(api, repository, branch, title, files)
        number, uploaded = _bring(push, author, progress)
        commit = api.model_info(repository, revision=branch).sha or branch
    url = f"{api.endpoint}/{repository}" + ("" if branch == "main" else f"/tree/{branch}")
    return Pushed(repository, branch, commit, number, uploaded, url)


def _bring(push: _Push, author: str, progress: Progress | None) -> tuple[int | None, int]:
    """Upload, check, publish and check again what the branch does not hold yet.

    Returns:
        Number of the pull request if there had to be one, and the files that were uploaded.
    """
    main = push.tree("main")
    base = main if push.branch == "main" else push.tree(push.branch)
    number, uploaded = None, 0
    if push.differs(base):
        if push.differs(main):
            number, uploaded = _upload(push, main, _own_request(push, author), progress)
            place = f"{push.api.endpoint}/{push.repository}/discussions/{number}"
            hint = f"Nothing was published. Look at {place}, close it, and push again."
            _check(push, f"refs/pr/{number}", main, hint=hint)
        push.publish(number)
        _check(push, push.branch, None, hint="Somebody else changes this branch; push again.")
    return number, uploaded


def _local_files(folder: Path) -> dict[str, _LocalFile]:
    """The files of a checkpoint, whole and unchanged, small ones first."""
    manifest = read_manifest(folder)
    changes = changed_files(folder, manifest)
    if changes:
        raise VerificationError(
            f"{folder} is not what its {MANIFEST} says, and is not pushed: {'; '.join(changes)}",
            hint="Convert again, or restore the files; a card is best edited on the Hub.",
        )
    content = (folder / MANIFEST).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    records = [
        (name, _LocalFile(guarded_path(folder, name), record["size"], record["sha256"]))
        for name, record in manifest["files"].items()
    ]
    records.append((MANIFEST, _LocalFile(folder / MANIFEST, len(content), digest)))
    return dict(sorted(records, key=lambda item: (_is_weights(item[0]), item[0])))


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _open_repository(
    api: HfApi, repository: str, *, public: bool, warn: Callable[[str], None] | None
) -> None:
    """Make the repository unless it is there."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        info = api.model_info(repository)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        api.create_repo(repository, private=not public, exist_ok=True)
        return
    if bool(info.private) == public and warn is not None:
        kind = "private" if info.private else "public"
        warn(f"{repository} exists and is {kind}; it stays so")


def _own_request(push: _Push, author: str) -> int | None:
    """The open pull request that an earlier run of this push left, if there is one."""
    requests = push.api.get_repo_discussions(
        push.repository,
        author=author,
        discussion_type="pull_request",
        discussion_status="open",
    )
    mark = push.title.rpartition(" ")[2]
    numbers = [
        request.num
        for request in requests
        if request.title.endswith(mark) and request.author == author and request.status == "open"
    ]
    return max(numbers, default=None)


def _upload(
    push: _Push, main: Tree, number: int | None, progress: Progress | None
) -> tuple[int, int]:
    """Bring what is missing to the pull request, made with the first commit if there is none.

    Small files go in one commit, each weight file in its own: what a commit has brought is not
    uploaded again.

    Returns:
        Number of the pull request, and of the files that were uploaded.
    """
    there = main if number is None else push.tree(f"refs/pr/{number}")
    missing = push.missing(there)
    total = sum(push.files[name].size for name in missing)
    small = [name for name in missing if not _is_weights(name)]
    batches: list[tuple[Sequence[str], Sequence[str]]] = [(small, push.stale(there))]
    batches += [([name], ()) for name in missing if _is_weights(name)]
    for names, deleted in batches:
        if not names and not deleted:
            continue
        if number is None:
            number = push.commit(names, deleted, None)
        else:
            push.commit(names, deleted, f"refs/pr/{number}")
        if progress is not None:
            progress("uploading", sum(push.files[name].size for name in names), total)
    assert number is not None, "what differs makes a commit"
    return number, len(missing)


def _check(push: _Push, revision: str, base: Tree | None, *, hint: str) -> None:
    """Hold what the Hub says of every file against the manifest.

    Args:
        push: What it should hold.
        revision: Where.
        base: What was there before, if nothing else may have come since.
        hint: What to do if something is wrong.

    Raises:
        VerificationError: If a file of ours is absent or differs, or another came with it.
    """
    tree = push.tree(revision)
    wrong = [f"{name} is absent or differs" for name in push.missing(tree)]
    wrong += [f"{name} is left" for name in push.stale(tree)]
    wrong += [
        f"{name} is none of ours"
        for name in sorted(tree.keys() - push.files.keys())
        if base is not None and (name not in base or base[name].blob_id != tree[name].blob_id)
    ]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise VerificationError(
            f"{push.repository} at {revision} is not what {MANIFEST} says: {shown}", hint=hint
        )


@contextmanager
def _forwarded(warn: Callable[[str], None] | None) -> Iterator[None]:
    """Pass on what the client warns of, such as the Hub's remarks on a card's metadata."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if warn is not None:
            warn(" ".join(str(warning.message).split()))
