"""The part of the Hub's HTTP interface that a download uses, served on the loopback interface."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["Answer", "Hub", "Request", "serve"]


class Request(NamedTuple):
    """What a client asked for, without host and query, and the token it showed."""

    method: str
    path: str
    authorization: str | None


class Answer(NamedTuple):
    """An answer of the server."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""

    @classmethod
    def error(cls, status: int, code: str | None = None) -> Answer:
        """A refusal as the Hub words it."""
        headers = {"X-Error-Code": code} if code is not None else {}
        return cls(status, {**headers, "X-Error-Message": "refused"}, b'{"error": "refused"}')


@dataclass
class Hub:
    """One model repository.

    Args:
        repository: ``org/name``.
        commits: Files of every commit, by its 40 digits.
        refs: Branches and tags.
        fault: Answers a request instead of the repository, where it gives an answer.
        served: Called with every request after its answer.
    """

    repository: str
    commits: dict[str, Mapping[str, bytes]]
    refs: dict[str, str]
    fault: Callable[[Request], Answer | None] = lambda request: None
    served: Callable[[Request], None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    @property
    def files(self) -> set[str]:
        """Names of all files that were downloaded or asked about."""
        middle = f"/{self.repository}/resolve/"
        paths = [request.path for request in self.requests if request.path.startswith(middle)]
        return {path.removeprefix(middle).partition("/")[2] for path in paths}

    def answer(self, request: Request) -> Answer:
        """Answer as the Hub does."""
        self.requests.append(request)
        return self.fault(request) or self._route(request.path)

    def _route(self, path: str) -> Answer:
        api, files = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if path == api:
            return self._info("main")
        for prefix, action in (
            (f"{api}/revision/", self._info),
            (f"{api}/tree/", self._tree),
            (files, self._file),
        ):
            if path.startswith(prefix):
                return action(*path.removeprefix(prefix).split("/", 1))
        return Answer.error(404, "RepoNotFound")

    def _commit(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None

    def _info(self, revision: str) -> Answer:
        commit = self._commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(self.commits[commit])]
        return _json({"id": self.repository, "sha": commit, "siblings": siblings, "tags": []})

    def _tree(self, revision: str) -> Answer:
        commit = self._commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        entries = []
        for name, content in sorted(self.commits[commit].items()):
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
            if _is_large(name):
                lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
                entry |= {"lfs": lfs}
            entries.append(entry)
        return _json(entries)

    def _file(self, revision: str, name: str) -> Answer:
        commit = self._commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        content = self.commits[commit].get(unquote(name))
        if content is None:
            missing = Answer.error(404, "EntryNotFound")
            return missing._replace(headers={**missing.headers, "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_id(content)}"'}
        if _is_large(name):  # the Hub names large files by their sha256
            headers |= {
                "X-Linked-Etag": f'"{_sha256(content)}"',
                "X-Linked-Size": str(len(content)),
            }
        return Answer(200, headers, content)


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a repository; its ``url`` is set meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def _respond(self) -> None:
            request = Request(self.command, urlsplit(self.path).path, self.headers["Authorization"])
            answer = hub.answer(request)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            hub.served(request)

        do_GET = do_HEAD = _respond  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: Any) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
