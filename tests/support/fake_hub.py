"""A Hugging Face hub of one process: serves folders as repositories `org/name` with one commit, and
remembers what it was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use(monkeypatch, cache: Path, endpoint: str = "") -> None:
    """Gives huggingface_hub, which has read its environment, another cache, and an endpoint; it is
    offline without one."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not endpoint)
    if endpoint:
        files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    close_session()  # keeps the offline mode, and connections to servers that are gone


@contextmanager
def serve(repositories: dict[str, Path], gated: tuple[str, ...] = (), broken: tuple[str, ...] = ()):
    """The endpoint's address and the list of files that were downloaded; revisions are `main`, `v1`
    and the commit.

    Files of `gated` repositories want the token "secret"; a `broken` one answers 500.
    """
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            name, (what, revision, *rest) = (
                "/".join(parts[2 * api :][:2]),
                [*parts[2 * api + 2 :], "", ""][:2] + parts[2 * api + 4 :],
            )
            if name in broken:
                return self.reply(500)
            if name in gated and not api and self.headers.get("Authorization") != "Bearer secret":
                return self.reply(401, X_Error_Code="GatedRepo")
            if name not in repositories:
                return self.reply(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", "v1", COMMIT, ""):
                return self.reply(404, X_Error_Code="RevisionNotFound")
            files = {
                str(file.relative_to(repositories[name])): file
                for file in repositories[name].rglob("*")
                if file.is_file()
            }
            if api and what == "tree":
                entries = [
                    {"type": "file", "path": path, "size": file.stat().st_size, "oid": tag(file)}
                    for path, file in files.items()
                ]
                return self.reply(
                    200, json.dumps(entries).encode(), Content_Type="application/json"
                )
            if api:
                return self.reply(
                    200,
                    json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(),
                    Content_Type="application/json",
                )
            file = files.get("/".join(rest))
            if file is None:
                return self.reply(404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                downloaded.append("/".join(rest))
            return self.reply(200, file.read_bytes(), ETag=f'"{tag(file)}"', X_Repo_Commit=COMMIT)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
