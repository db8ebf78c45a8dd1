"""A fake Hugging Face Hub on loopback that serves folders and accepts uploads of huggingface_hub."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEAD_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def list_pinned_revisions(hub_id):
    """Return the commits of a Hub id that cards pin; the small models served in their place have all of them."""
    from sca_registry import REGISTRIES

    cards = [registry.get_card(each) for registry in REGISTRIES.values() for each in registry.list_names()]
    return {
        card.options["revision"]
        for card in cards
        if card.options.get("weights") == hub_id and "revision" in card.options
    }


def get_requested_commit(revision):
    """Return the commit that `revision` (a list of 0 or 1) names, or that of "main" for any other revision."""
    return revision[0] if revision and re.fullmatch("[0-9a-f]{40}", revision[0]) else HEAD_COMMIT


class Hub:
    """Serves `models[id] = folder`.

    requests: the received requests as "METHOD path". gated_models: ids that require the token "secret".
    truncated_files: names of files whose first download ends halfway. upload_folder: folder of pushed models; None
    rejects uploads.
    """

    def __init__(self):
        self.models: dict[str, Path] = {}
        self.requests: list[str] = []
        self.gated_models: set[str] = set()
        self.truncated_files: set[str] = set()
        self.upload_folder: Path | None = None

    @contextmanager
    def run_server(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.handle_get(self, body=False)

            def do_GET(self):
                hub.handle_get(self, body=True)

            def do_POST(self):
                hub.handle_post(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def handle_get(self, request, body):
        self.requests.append(f"{request.command} {request.path}")
        path = request.path.partition("?")[0].strip("/")
        api_path = path.removeprefix("api/models/") if path.startswith("api/models/") else None
        name = "/".join((api_path or path).split("/")[:2])
        if name not in self.models:
            return self.send_error(request, 404, "RepoNotFound")
        if name in self.gated_models and request.headers.get("Authorization") != "Bearer secret":
            return self.send_error(request, 403, "GatedRepo")
        if api_path is not None:
            api_segments = api_path.split("/")[2:]
            if api_segments[:1] == ["revision"] and api_segments[1] not in (
                "main",
                HEAD_COMMIT,
                *list_pinned_revisions(name),
            ):
                return self.send_error(request, 404, "RevisionNotFound")
            return self.send_model_info(
                request, name, get_requested_commit(api_segments[1:2]), is_tree_request=api_segments[:1] == ["tree"]
            )
        file, commit = self.models[name] / "/".join(path.split("/")[4:]), get_requested_commit(path.split("/")[3:4])
        return (
            self.send_file(request, file, commit, body)
            if file.is_file()
            else self.send_error(request, 404, "EntryNotFound")
        )

    def handle_post(self, request, body):
        """Respond to the requests of an upload: create a repository, validate, preupload and commit."""
        self.requests.append(f"{request.command} {request.path}")
        if self.upload_folder is None or request.headers.get("Authorization") != "Bearer secret":
            return self.send_error(request, 403, "Forbidden")
        path = request.path.partition("?")[0].strip("/")
        if path == "api/repos/create":
            create_request = json.loads(body)
            name = "/".join(filter(None, (create_request.get("organization"), create_request["name"])))
            folder = self.models[name] = self.upload_folder / name
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
        commit_url = f"http://{request.headers['Host']}/{name}/commit/{HEAD_COMMIT}"
        return self.send_json(request, {"commitUrl": commit_url, "commitOid": HEAD_COMMIT, "hookOutput": ""})

    @staticmethod
    def send_json(request, content):
        payload = json.dumps(content).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(payload)))
        request.end_headers()
        request.wfile.write(payload)

    def send_model_info(self, request, name, commit, is_tree_request):
        folder = self.models[name]
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if is_tree_request:
            content = [
                {"type": "file", "path": file, "size": (self.models[name] / file).stat().st_size, "oid": file}
                for file in files
            ]
        else:
            content = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files], "private": False}
        self.send_json(request, content)

    def send_file(self, request, file, commit, body):
        content = file.read_bytes()
        first_byte = int((request.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        request.send_response(206 if first_byte else 200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:40]}"')
        request.send_header("X-Repo-Commit", commit)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content) - first_byte))
        if first_byte:
            request.send_header("Content-Range", f"bytes {first_byte}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if not body:
            return
        if file.name in self.truncated_files:
            self.truncated_files.discard(file.name)
            request.wfile.write(content[first_byte : first_byte + (len(content) - first_byte) // 2])
            request.close_connection = True
            return
        request.wfile.write(content[first_byte:])

    @staticmethod
    def send_error(request, status, reason):
        request.send_response(status)
        request.send_header("X-Error-Code", reason)
        request.send_header("Content-Length", "0")
        request.end_headers()
