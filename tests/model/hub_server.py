"""A small HTTP server on the loopback address that serves repositories in the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

ERRORS = {401: "GatedRepo", 404: "RepoNotFound"}


@dataclass
class Repo:
    """Files by commit, and the commit of each revision. `status` is what every request answers."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    status: int = 200
    # After how many bytes of a file the connection drops, in order; an empty list drops no more.
    drops: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Hub:
    """The repositories by name, and what was asked for."""

    repos: dict[str, Repo]
    requests: Counter[str] = field(default_factory=Counter)
    starts: list[tuple[str, int]] = field(default_factory=list)  # file and first byte


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.requests[f"{self.command} {path}"] += 1
            repository = r"([^/]+/[^/]+)"
            if match := re.fullmatch(rf"/api/models/{repository}/(revision|tree)/([^/]+)", path):
                self.api(*match.groups())
            elif match := re.fullmatch(rf"/{repository}/resolve/([^/]+)/(.+)", path):
                self.resolve(*match.groups())
            elif match := re.fullmatch(rf"/blobs/{repository}/([^/]+)/(.+)", path):
                self.blob(*match.groups())
            else:
                self.answer(404)

        def commit(self, name: str, revision: str) -> str | None:
            """The commit of a revision; answers the error where there is none."""
            repo = hub.repos.get(name)
            status = repo.status if repo else 404
            if repo is None or status != 200:
                self.answer(status, X_Error_Code=ERRORS.get(status, ""), X_Error_Message="no")
                return None
            commit = repo.revisions.get(revision, revision)
            if commit not in repo.commits:
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no")
                return None
            return commit

        def api(self, name: str, what: str, revision: str) -> None:
            if (commit := self.commit(name, revision)) is None:
                return
            answer: Any = {"id": name, "sha": commit, "siblings": [], "private": False}
            if what == "tree":
                answer = [
                    {"type": "file", "path": file, "size": len(data), "oid": etag(data)}
                    for file, data in hub.repos[name].commits[commit].items()
                ]
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

        def resolve(self, name: str, revision: str, file: str) -> None:
            if (commit := self.commit(name, revision)) is None:
                return
            data = hub.repos[name].commits[commit][file]
            headers = {"X_Repo_Commit": commit, "ETag": f'"{etag(data)}"'}
            if file.endswith(".safetensors"):  # large files are on another host
                port = self.headers["Host"].rpartition(":")[2]
                headers |= {"Location": f"http://localhost:{port}/blobs/{name}/{commit}/{file}"}
                headers |= {"X_Linked_Size": str(len(data)), "X_Linked_ETag": headers["ETag"]}
                self.answer(302, **headers)
            else:
                self.answer(200, data, **headers)

        def blob(self, name: str, commit: str, file: str) -> None:
            repo = hub.repos[name]
            data = repo.commits[commit][file]
            match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else 0
            part = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if match else {}
            if self.command == "GET":
                hub.starts.append((file, start))
            if self.command == "GET" and (drops := repo.drops.get(file)):
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start : start + drops.pop(0)])
                self.close_connection = True
            else:
                self.answer(206 if start else 200, data[start:], ETag=f'"{etag(data)}"', **part)

    return Handler


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of a server of `hub`, on a free port of the loopback address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
