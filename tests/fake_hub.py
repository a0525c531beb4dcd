"""A local stand-in for Hugging Face, for huggingface_hub to talk to over HTTP.

It serves folders as repositories: information on one, its tree, its files, which may be
asked for from any byte on. Large files are elsewhere, as on Hugging Face.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LARGE_BYTES = 100_000
_FILES = r"/([^/]+/[^/]+)/(resolve/[^/]+|large)/(.+)"


@dataclass
class FakeHub:
    """What is served, and what was asked for.

    ``repos`` are folders and their commits by owner/name; ``gated`` those that want a
    token. ``requests`` has the method and path of each request, and the first byte
    where it asks for the rest of a file. A file whose path ends with ``cut`` is broken
    off in its middle, ``cuts`` times.
    """

    endpoint: str
    repos: dict[str, tuple[Path, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    cut: str = ""
    cuts: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def asked_for(self) -> set[str]:
        """The names of the files whose content was asked for."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        found = (re.fullmatch(_FILES, path) for path in paths)
        return {match[3] for match in found if match}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve until the block ends."""

    class Handler(_Handler):
        hub = FakeHub("")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Handler.hub
    finally:
        Handler.hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first else 0
        self.hub.requests.append((self.command, path, start))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            self._about(found[1], found[2] or "")
        elif found := re.fullmatch(_FILES, path):
            self._file(*found.groups(), start)
        else:
            self._refuse(404, "EntryNotFound")

    def _about(self, repo: str, rest: str) -> None:
        if repo not in self.hub.repos:
            self._refuse(404, "RepoNotFound")
            return
        folder, sha = self.hub.repos[repo]
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        asked = re.fullmatch(r"(?:/(revision|tree)/([^/]+))?", rest)
        if not asked or asked[2] not in (None, "main", sha):
            self._refuse(404, "RevisionNotFound")
            return
        listed = [_entry(folder, path) for path in files]
        if asked[1] == "tree":
            self._json(listed)
            return
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
            for e in listed
        ]
        self._json({"id": repo, "sha": sha, "private": False, "siblings": siblings})

    def _file(self, repo: str, where: str, name: str, start: int) -> None:
        folder, sha = self.hub.repos.get(repo, (Path("/no/such"), ""))
        path = folder / name
        if where not in ("large", f"resolve/{sha}") or not path.is_file():
            self._refuse(404, "EntryNotFound")
        elif where == "large":  # signed addresses there; the token is not sent
            self._content(path, start, {})
        elif repo in self.hub.gated and "Authorization" not in self.headers:
            self._refuse(401, "GatedRepo")
        else:
            entry = _entry(folder, path)
            headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'}
            if "lfs" not in entry:
                self._content(path, start, headers)
                return
            headers["X-Linked-ETag"] = f'"{entry["lfs"]["oid"]}"'
            headers["X-Linked-Size"] = str(entry["size"])
            # Another host, or the client would ask there for what the first one knows.
            host = self.hub.endpoint.replace("127.0.0.1", "localhost")
            place = f"{host}/{repo}/large/{name}"
            self._head(302, {**headers, "Location": place, "Content-Length": "0"})

    def _content(self, path: Path, start: int, headers: dict[str, str]) -> None:
        content = path.read_bytes()[start:]
        length = {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
        if start:
            end = start + len(content)
            length["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
        self._head(206 if start else 200, {**headers, **length})
        if self.command == "HEAD":
            return
        if self.hub.cuts and self.hub.cut and str(path).endswith(self.hub.cut):
            self.hub.cuts -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.go_on.wait()
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, answer: object) -> None:
        text = json.dumps(answer).encode()
        kind = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        self._head(200, kind)
        self.wfile.write(text)

    def _refuse(self, status: int, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(folder: Path, path: Path) -> dict:
    """A file as the tree lists it."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": len(content),
        "oid": blob,
    }
    if len(content) >= _LARGE_BYTES:
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return entry
