"""A repository on the Hub that can be written to: what an upload uses of the HTTP interface.

Small files go into a commit, large ones to a store beforehand (Git LFS batch API, basic transfer);
a pull request is a ref of its own until it is merged.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.faults.hub_client import TOKEN
from tests.faults.hub_server import (
    Answer,
    Hub,
    Request,
    git_id,
    is_large,
    json_answer,
    sha256,
)

__all__ = ["USER", "PullRequest", "WritableHub", "empty_hub"]

USER = "someone"
_TIME = "2026-01-02T03:04:05.678Z"


@dataclass
class PullRequest:
    """A pull request; its ref is ``refs/pr/N``."""

    title: str
    base: str
    author: str = USER
    status: str = "open"


@dataclass
class WritableHub(Hub):
    """One model repository, which may be yet to be made.

    Args:
        exists: Whether it is there.
        stored: What the store of large files keeps of what it is sent.
        kept: What a commit keeps of a small file.
        warnings: What the Hub remarks about a card.
        errors: Why it refuses one.
    """

    exists: bool = True
    stored: Callable[[bytes], bytes] = lambda content: content
    kept: Callable[[str, bytes], bytes] = lambda name, content: content
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    blobs: dict[str, bytes] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)

    def count(self, method: str, part: str) -> int:
        """Requests so far with a method, and a part of the path."""
        return sum(r.method == method and part in r.path for r in self.requests)

    def holds(self, revision: str) -> Mapping[str, bytes]:
        """Files of a revision, but for the one that every repository has."""
        commit = self.commit(revision)
        assert commit is not None
        return {n: c for n, c in self.commits[commit].items() if n != ".gitattributes"}

    def add_commit(self, ref: str, files: Mapping[str, bytes]) -> str:
        """Let a ref hold these files."""
        commit = f"{0xC0FFEE + len(self.commits):040x}"
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def route(self, request: Request) -> Answer:
        """Answer as the Hub does, to those who may ask."""
        api, repo = f"/api/models/{self.repository}", f"/{self.repository}"
        if request.path.startswith("/store/"):  # not the Hub: its addresses are secrets themselves
            return self._store(request, request.path.removeprefix("/store/"))
        allowed = request.authorization == f"Bearer {TOKEN}"
        hidden = not self.exists or (self.private and not allowed)
        if hidden and request.path.startswith((api, repo)):
            return Answer.error(404, "RepoNotFound")
        routes: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", f"{api}/preupload/(.+)", self._modes),
            ("POST", rf"{repo}\.git/info/lfs/objects/batch", self._batch),
            ("POST", "/verify", self._verify),
            ("POST", f"{api}/commit/(.+)", self._commit),
            ("POST", f"{api}/branch/(.+)", self._branch),
            ("GET", f"{api}/discussions", self._discussions),
            ("POST", rf"{api}/discussions/(\d+)/merge", self._merge),
            ("POST", rf"{api}/discussions/(\d+)/status", self._status),
        )
        for method, pattern, action in routes:
            match = re.fullmatch(pattern, request.path)
            if match is not None and method == request.method:
                return action(request, *match.groups()) if allowed else Answer.error(401)
        return super().route(request)

    def _whoami(self, _: Request) -> Answer:
        return json_answer({"type": "user", "name": USER})

    def _create(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        if self.exists:
            return Answer.error(409)
        assert f"{wanted['organization']}/{wanted['name']}" == self.repository
        self.exists = True
        self.private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.add_commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return json_answer({"url": f"{self.url}/{self.repository}"})

    def _validate(self, request: Request) -> Answer:
        assert json.loads(request.body)["content"].startswith("---\n")
        words = {
            "warnings": [{"message": text} for text in self.warnings],
            "errors": [{"message": text} for text in self.errors],
        }
        return json_answer(words, 400 if self.errors else 200)

    def _modes(self, request: Request, revision: str) -> Answer:
        commit = self.commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        there = self.commits[commit]
        files = []
        for name in (file["path"] for file in json.loads(request.body)["files"]):
            oid = (sha256 if is_large(name) else git_id)(there[name]) if name in there else None
            mode = "lfs" if is_large(name) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_answer({"files": files})

    def _batch(self, request: Request) -> Answer:
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/store/{wanted['oid']}"},
                "verify": {"href": f"{self.url}/verify"},
            }
            objects.append(wanted | ({} if wanted["oid"] in self.blobs else {"actions": actions}))
        return json_answer({"transfer": "basic", "objects": objects})

    def _store(self, request: Request, oid: str) -> Answer:
        assert request.authorization is None, "the token is for the Hub alone"
        assert sha256(request.body) == oid
        self.blobs[oid] = self.stored(request.body)
        return Answer(200)

    def _verify(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        return Answer(200 if wanted["oid"] in self.blobs else 404)

    def _commit(self, request: Request, revision: str) -> Answer:
        revision = unquote(revision)
        parent = self.commit(revision)
        if parent is None:
            return Answer.error(404, "RevisionNotFound")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        files = dict(self.commits[parent])
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        number = None
        if "create_pr=1" in request.query:
            number = len(self.pulls) + 1
            self.pulls[number] = PullRequest(header["value"]["summary"], parent)
            revision = f"refs/pr/{number}"
        commit = self.add_commit(revision, files)
        place = f"{self.url}/{self.repository}"
        made = {"commitOid": commit, "commitUrl": f"{place}/commit/{commit}"}
        return json_answer(made | {"pullRequestUrl": f"{place}/discussions/{number}"})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, bytes]) -> None:
        name = value["path"]
        if key == "deletedFile":
            del files[name]
        elif key == "lfsFile":
            files[name] = self.blobs[value["oid"]]
        else:
            assert (key, value["encoding"]) == ("file", "base64")
            assert not is_large(name)
            files[name] = self.kept(name, base64.b64decode(value["content"]))

    def _branch(self, _: Request, name: str) -> Answer:
        if unquote(name) in self.refs:
            return Answer.error(409)
        self.refs[unquote(name)] = self.refs["main"]
        return Answer(200)

    def _discussions(self, _: Request) -> Answer:
        found = [
            {
                "num": number,
                "title": pull.title,
                "author": {"name": pull.author},
                "createdAt": _TIME,
                "status": pull.status,
                "repo": {"name": self.repository, "type": "model"},
                "isPullRequest": True,
            }
            for number, pull in self.pulls.items()
        ]
        return json_answer({"count": len(found), "start": 0, "discussions": found})

    def _merge(self, _: Request, number: str) -> Answer:
        pull = self.pulls[int(number)]
        if pull.status != "open":
            return Answer.error(409)
        pull.status = "merged"
        theirs, base = self.commits[self.refs[f"refs/pr/{number}"]], self.commits[pull.base]
        files = {**self.commits[self.refs["main"]], **theirs}
        self.add_commit("main", {n: c for n, c in files.items() if n in theirs or n not in base})
        return json_answer({})

    def _status(self, request: Request, number: str) -> Answer:
        status = json.loads(request.body)["status"]
        self.pulls[int(number)].status = status
        event = {"id": "0", "type": "status-change", "createdAt": _TIME, "author": {"name": USER}}
        return json_answer({"newStatus": {**event, "data": {"status": status}}})


def empty_hub(repository: str) -> WritableHub:
    """A Hub on which the repository is yet to be made."""
    return WritableHub(repository, {}, {}, exists=False)
