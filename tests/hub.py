"""A model hub on loopback: folders served, and written, the way huggingface_hub asks for it."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pinned_by_cards(name):
    """The commits of a hub id that cards pin; the small models that are served in their place are of all of them."""
    from sca_registry import REGISTRIES

    cards = [registry.get_card(each) for registry in REGISTRIES.values() for each in registry.list_names()]
    return {
        card.options["revision"] for card in cards if card.options.get("weights") == name and "revision" in card.options
    }


def commit_of(revision):
    """The commit that a request names, in a list; that of "main" for any other revision."""
    return revision[0] if revision and re.fullmatch("[0-9a-f]{40}", revision[0]) else COMMIT


class Hub:
    """Serves `models[id] = folder`. requests: what was asked, as "METHOD path". gated: ids that need
    the token "secret". cut: files whose first download breaks off half way. given: where pushed models lie; without,
    nobody may write.
    """

    def __init__(self):
        self.models: dict[str, Path] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.given: Path | None = None

    @contextmanager
    def serving(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def do_POST(self):
                hub.take(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, request, body):
        self.requests.append(f"{request.command} {request.path}")
        path = request.path.partition("?")[0].strip("/")
        api = path.removeprefix("api/models/") if path.startswith("api/models/") else None
        name = "/".join((api or path).split("/")[:2])
        if name not in self.models:
            return self.refuse(request, 404, "RepoNotFound")
        if name in self.gated and request.headers.get("Authorization") != "Bearer secret":
            return self.refuse(request, 403, "GatedRepo")
        if api is not None:
            rest = api.split("/")[2:]
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT, *pinned_by_cards(name)):
                return self.refuse(request, 404, "RevisionNotFound")
            return self.describe(request, name, commit_of(rest[1:2]), tree=rest[:1] == ["tree"])
        file, commit = self.models[name] / "/".join(path.split("/")[4:]), commit_of(path.split("/")[3:4])
        return (
            self.send_file(request, file, commit, body)
            if file.is_file()
            else self.refuse(request, 404, "EntryNotFound")
        )

    def take(self, request, body):
        """A repository that is made, what is asked of its files before they come, and the commit that has them."""
        self.requests.append(f"{request.command} {request.path}")
        if self.given is None or request.headers.get("Authorization") != "Bearer secret":
            return self.refuse(request, 403, "Forbidden")
        path = request.path.partition("?")[0].strip("/")
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            folder = self.models[name] = self.given / name
            folder.mkdir(parents=True, exist_ok=True)
            return self.send_json(request, {"url": f"http://{request.headers['Host']}/{name}", "name": name})
        if path == "api/validate-yaml":
            return self.send_json(request, {"errors": [], "warnings": []})
        name = "/".join(path.split("/")[2:4])
        if "preupload" in path:
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self.send_json(request, {"files": [{**each, "shouldIgnore": False} for each in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                target = self.models[name] / line["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        address = f"http://{request.headers['Host']}/{name}/commit/{COMMIT}"
        return self.send_json(request, {"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})

    @staticmethod
    def send_json(request, content):
        text = json.dumps(content).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def describe(self, request, name, commit, tree):
        folder = self.models[name]
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if tree:
            content = [
                {"type": "file", "path": file, "size": (self.models[name] / file).stat().st_size, "oid": file}
                for file in files
            ]
        else:
            content = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files], "private": False}
        self.send_json(request, content)

    def send_file(self, request, file, commit, body):
        content = file.read_bytes()
        start = int((request.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:40]}"')
        request.send_header("X-Repo-Commit", commit)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if not body:
            return
        if file.name in self.cut:
            self.cut.discard(file.name)
            request.wfile.write(content[start : start + (len(content) - start) // 2])
            request.close_connection = True
            return
        request.wfile.write(content[start:])

    @staticmethod
    def refuse(request, status, reason):
        request.send_response(status)
        request.send_header("X-Error-Code", reason)
        request.send_header("Content-Length", "0")
        request.end_headers()
