"""A small copy of the hub: repositories of a folder over HTTP, as huggingface_hub asks for them."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


@contextlib.contextmanager
def hub(folder):
    """Serves `folder/OWNER/NAME/FILE`: its address, and what was asked of it.

    Files that are named in the list `broken` of the second are not given.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                return self.model(match[1], match[2])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.file(folder / match[1] / match[3], match[2], body)
            return self.send(404, b"{}")

        def model(self, name, revision):
            files = [p for p in (folder / name).glob("*") if p.is_file()]
            if not files or revision in ("nothing",):
                kind = "RevisionNotFound" if files else "RepoNotFound"
                return self.send(404, b"{}", {"X-Error-Code": kind})
            state["revisions"].append((name, revision))
            sizes = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
            return self.send(
                200, json.dumps({"id": name, "sha": COMMIT, "siblings": sizes}).encode()
            )

        def file(self, path, revision, body):
            if not path.is_file() or path.name in state["broken"]:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = path.read_bytes()
            more = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            more["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            if not body:
                return self.send(200, content, more, body=False)
            status = 200
            if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                more["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
                content, status = content[int(start[1]) :], 206
            state["files"].append(f"{path.parent.name}/{path.name}")
            return self.send(status, content, more)

        def send(self, status, content, more=None, body=True):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    state = {"files": [], "revisions": [], "broken": []}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
