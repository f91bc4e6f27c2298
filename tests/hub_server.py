"""A Hub on 127.0.0.1 that serves folders: enough for the real client to list and download."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body: bool):
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe(parts[2:4], parts[4:])
        repository = self.server.root.joinpath(*parts[:2])
        path = self.server.root.joinpath(*parts[:2], *parts[4:])
        if not repository.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if parts[2:3] != ["resolve"] or not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        tag = hashlib.sha1(content).hexdigest()
        self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}, with_body)

    def _describe(self, repository: list[str], rest: list[str]):
        folder = self.server.root.joinpath(*repository)
        if not folder.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if rest[:1] == ["tree"]:
            answer = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
                for name, path in zip(names, files)
            ]
        else:
            answer = {"id": "/".join(repository), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool = True):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub_server(root: Path):
    """Serve `root/owner/name` as the repositories of the Hub while the context is open."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.tokens = Path(root), set()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with (
            mock.patch.object(constants, "ENDPOINT", url),
            mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
            mock.patch("huggingface_hub.hf_api.api.endpoint", url),
        ):
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
