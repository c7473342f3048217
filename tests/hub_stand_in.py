"""A small Hugging Face hub on 127.0.0.1: enough of its HTTP API to fetch from and push to.

Large files answer with a redirect to another host name ("localhost"), as the hub's do to its CDN.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
LARGE = (".safetensors", ".bin", ".gguf")

Files = dict[str, bytes]


@dataclass
class Repository:
    """Files by commit, commits by branch; a gated one shows its list but not its files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        listing = "".join(f"{name} {sha(content)}\n" for name, content in sorted(files.items()))
        number = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[number] = dict(files)
        self.branches[branch] = number
        return number

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches.get(revision, revision)]


@dataclass(frozen=True)
class Seen:
    """A request that arrived, and the bytes of the answer's body that were sent."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class StandIn(ThreadingHTTPServer):
    """The hub's state, and what tests set to make it misbehave.

    Attributes:
        repositories: By ``owner/name``.
        cuts: For a path's last part: after how many bytes of its next answers' bodies the
            connection breaks, one number per answer.
        resets: Whether it breaks by a reset instead of an orderly end.
        damaged: For a path's last part: what is sent in place of its content.
        answers: For a path's last part: what its requests are answered with.
        down: Every request is answered with this status.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.cuts: dict[str, list[int]] = {}
        self.resets = False
        self.damaged: dict[str, bytes] = {}
        self.answers: dict[str, Answer] = {}
        self.down = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""

    def add(self, name: str, files: Files, *, branch: str = "main", **options: bool) -> str:
        """Put files into a repository; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(**options))
        self.objects |= {sha(content): content for path, content in files.items() if large(path)}
        return repository.commit(branch, files)

    def gets(self, part: str) -> list[Seen]:
        """GET requests answered with content whose path has ``part`` in it."""
        return [s for s in self.seen if s.method == "GET" and part in s.path and s.sent]

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> Answer:
        if self.down:
            return problem(self.down, "out of order")
        if (last := path.rpartition("/")[2]) in self.answers:
            return self.answers[last]
        if token not in (None, WRITER, READER):
            return problem(401, "Invalid credentials in Authorization header")
        for verb, pattern, function in ROUTES:
            if verb == method.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                parts = [unquote(part) for part in match.groups("")]
                if verb == "GET":
                    return function(self, *parts, token)
                if token != WRITER and not path.startswith("/cdn/"):
                    status = 403 if token else 401
                    return problem(status, "You don't have the rights to do this")
                return function(self, *parts, body)
        return problem(404, f"no such endpoint: {method} {path}")

    def find(self, name: str, token: str | None) -> Repository | Answer:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token is None):
            return problem(404 if token else 401, "Repository not found", code="RepoNotFound")
        return repository


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large(path: str) -> bool:
    return path.endswith(LARGE)


def say(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def problem(status: int, message: str, code: str = "") -> Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), headers)


def info(hub: StandIn, name: str, revision: str, token: str | None) -> Answer:
    found = hub.find(name, token)
    if isinstance(found, Answer):
        return found
    commit = found.branches.get(revision or "main", revision)
    if commit not in found.commits:
        return problem(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
    siblings = [{"rfilename": path} for path in found.commits[commit]]
    return say({"id": name, "sha": commit, "private": found.private, "siblings": siblings})


def tree(hub: StandIn, name: str, revision: str, folder: str, token: str | None) -> Answer:
    known = info(hub, name, revision, token)
    if known.status != 200:
        return known
    if folder:
        return problem(404, "no such folder", code="EntryNotFound")
    rows = []
    for path, content in hub.repositories[name].files(revision).items():
        row = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
        lfs = {"oid": sha(content), "size": len(content), "pointerSize": 130}
        rows.append(row | ({"lfs": lfs, "xetHash": sha(content)} if large(path) else {}))
    return say(rows)


def resolve(hub: StandIn, name: str, revision: str, path: str, token: str | None) -> Answer:
    known = info(hub, name, revision, token)
    if known.status != 200:
        return known
    repository = hub.repositories[name]
    commit = repository.branches.get(revision, revision)
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if repository.gated and token != WRITER:
        return problem(403 if token else 401, f"Access to {name} is gated", code="GatedRepo")
    content = repository.commits[commit].get(path)
    if content is None:
        missing = problem(404, "Entry not found", code="EntryNotFound")
        return Answer(404, missing.body, {**missing.headers, **headers})
    if large(path):
        cdn = f"http://localhost:{hub.server_port}/cdn/{sha(content)}/{path}"
        linked = {"X-Linked-Etag": f'"{sha(content)}"', "X-Linked-Size": str(len(content))}
        return Answer(302, b"", {**headers, **linked, "Location": cdn})
    return Answer(200, content, {**headers, "ETag": f'"{git_sha(content)}"'})


def fetch_object(hub: StandIn, oid: str, path: str, token: str | None) -> Answer:
    if token is not None:
        return problem(400, "the hub's token was sent to another host")
    return Answer(200, hub.damaged.get(path, hub.objects[oid]), {"ETag": f'"{oid}"'})


def store_object(hub: StandIn, oid: str, _: str, body: bytes) -> Answer:
    if sha(body) != oid:
        return problem(400, "the content is not what was announced")
    hub.objects[oid] = body
    return Answer(200)


def create(hub: StandIn, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    url = {"url": f"{hub.url}/{name}"}
    if name in hub.repositories:
        return say({**url, "error": "You already created this model repo"}, 409)
    private = asked.get("visibility") == "private"
    hub.repositories[name] = Repository(private=private)
    hub.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
    return say(url)


def branch(hub: StandIn, name: str, new: str, _: bytes) -> Answer:
    branches = hub.repositories[name].branches
    if new in branches:
        return problem(409, "Reference already exists")
    branches[new] = branches["main"]
    return say({})


def preupload(_: StandIn, __: str, ___: str, body: bytes) -> Answer:
    modes = {True: "lfs", False: "regular"}
    rows = [
        {"path": f["path"], "uploadMode": modes[large(f["path"])], "shouldIgnore": False}
        for f in json.loads(body)["files"]
    ]
    return say({"files": rows})


def batch(hub: StandIn, _: str, body: bytes) -> Answer:
    rows = []
    for asked in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{hub.url}/cdn/{asked['oid']}/-"}}
        rows.append(asked | ({} if asked["oid"] in hub.objects else {"actions": upload}))
    return say({"transfer": "basic", "objects": rows})


def commit(hub: StandIn, name: str, revision: str, body: bytes) -> Answer:
    repository = hub.repositories[name]
    files = dict(repository.files(revision))
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif entry["key"] == "deletedFile":
            del files[value["path"]]
    number = repository.commit(revision, files)
    return say({"commitUrl": f"{hub.url}/{name}/commit/{number}", "commitOid": number})


REPOSITORY = r"/api/(?:models|datasets)/([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", rf"{REPOSITORY}(?:/revision/([^/]+))?", info),
    ("GET", rf"{REPOSITORY}/tree/([^/]+)/?(.*)", tree),
    ("GET", r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    ("GET", r"/cdn/(\w+)/(.+)", fetch_object),
    ("PUT", r"/cdn/(\w+)/(.+)", store_object),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", lambda *_: say({"errors": [], "warnings": []})),
    ("POST", rf"{REPOSITORY}/branch/([^/]+)", branch),
    ("POST", rf"{REPOSITORY}/preupload/([^/]+)", preupload),
    ("POST", rf"{REPOSITORY}/commit/([^/]+)", commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None:
        """Keep stderr for the client under test."""

    def reply(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        answer = self.server.answer(self.command, path, token, body)
        status, content, headers = answer.status, answer.body, dict(answer.headers)
        asked = self.headers.get("Range")
        if asked and status == 200:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            content = b""
        planned = self.server.cuts.get(path.rpartition("/")[2]) if content else None
        sent = content[: planned.pop(0)] if planned else content
        self.server.seen.append(Seen(self.command, path, asked, token, len(sent)))
        self.wfile.write(sent)
        if len(sent) < len(content):
            self.close_connection = True
            if self.server.resets:
                time.sleep(0.2)  # a reset discards what the client has not read yet
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close()
                self.wfile.close()
                self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = reply  # noqa: N815


@contextmanager
def serve() -> Iterator[StandIn]:
    """Run a stand-in on a free port until the ``with`` block ends."""
    with StandIn() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
