"""The part of the Hub's HTTP interface that a download uses, served on the loopback interface.

``tests/hub/writable.py`` adds what an upload uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

__all__ = ["Answer", "Hub", "Request", "git_id", "is_large", "json_answer", "serve", "sha256"]


class Request(NamedTuple):
    """What a client asked for, without host, and the token it showed."""

    method: str
    path: str
    authorization: str | None
    query: str = ""
    range: str | None = None
    body: bytes = b""


class Answer(NamedTuple):
    """An answer of the server; with status 0 it hangs up instead."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""

    @classmethod
    def error(cls, status: int, code: str | None = None) -> Answer:
        """A refusal as the Hub words it."""
        headers = {"X-Error-Code": code} if code is not None else {}
        return cls(status, {**headers, "X-Error-Message": "refused"}, b'{"error": "refused"}')


AnyHub = TypeVar("AnyHub", bound="Hub")


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
    private: bool = False
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file's contents
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
        return self.fault(request) or self.route(request)

    def route(self, request: Request) -> Answer:
        """Answer from the repository."""
        path = request.path
        api, files = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if path == api:
            return self._info("main")
        for prefix, action in (
            (f"{api}/revision/", self._info),
            (f"{api}/tree/", lambda revision: self._tree(revision, request)),
            (files, lambda revision, name: self._file(revision, name, request)),
        ):
            if path.startswith(prefix):
                return action(*path.removeprefix(prefix).split("/", 1))
        return Answer.error(404, "RepoNotFound")

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None

    def _info(self, revision: str) -> Answer:
        commit = self.commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(self.commits[commit])]
        return json_answer(
            {
                "id": self.repository,
                "sha": commit,
                "siblings": siblings,
                "tags": [],
                "private": self.private,
            }
        )

    def _tree(self, revision: str, request: Request) -> Answer:
        commit = self.commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        entries: list[dict[str, Any]] = []
        for name, content in sorted(self.commits[commit].items()):
            folder = name.rpartition("/")[0]
            if folder and "recursive=true" not in request.query.lower():
                entry = {"type": "directory", "path": folder, "size": 0, "oid": git_id(b"")}
                entries += [] if entry in entries else [entry]
                continue
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
            if is_large(name):
                lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
                entry |= {"lfs": lfs}
            entries.append(entry)
        return json_answer(entries)

    def _file(self, revision: str, name: str, request: Request) -> Answer:
        commit = self.commit(unquote(revision))
        if commit is None:
            return Answer.error(404, "RevisionNotFound")
        content = self.commits[commit].get(unquote(name))
        if content is None:
            missing = Answer.error(404, "EntryNotFound")
            return missing._replace(headers={**missing.headers, "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'}
        if is_large(name):  # the Hub names large files by their sha256
            headers |= {
                "X-Linked-Etag": f'"{sha256(content)}"',
                "X-Linked-Size": str(len(content)),
            }
        part, status = content, 200
        if request.range is not None:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range).groups()  # type: ignore[union-attr]
            part, status = content[int(first) : int(last) + 1 if last else None], 206
        if request.method == "GET":
            self.sent[name] = self.sent.get(name, 0) + len(part)
        return Answer(status, headers, part)


@contextlib.contextmanager
def serve(hub: AnyHub) -> Iterator[AnyHub]:
    """Serve a repository; its ``url`` is set meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # of a client that was killed
                super().handle()

        def _respond(self) -> None:
            url = urlsplit(self.path)
            request = Request(
                self.command,
                url.path,
                self.headers["Authorization"],
                url.query,
                self.headers["Range"],
                self.rfile.read(int(self.headers["Content-Length"] or 0)),
            )
            answer = hub.answer(request)
            if not answer.status:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            hub.served(request)

        do_GET = do_HEAD = do_POST = do_PUT = _respond  # noqa: N815 - the names that http.server looks for

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


def json_answer(value: object, status: int = 200) -> Answer:
    """An answer of JSON."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def is_large(name: str) -> bool:
    """Whether the Hub stores a file by its sha256 and not in git."""
    return name.endswith((".safetensors", ".bin"))


def sha256(content: bytes) -> str:
    """Name of a large file."""
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """Name of a small file: that of its git blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
