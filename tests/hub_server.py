"A hub on this machine: it serves a folder as huggingface.co serves a repository, refuses by the owner's name, and cuts connections."

import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

REFUSALS = {  # by owner: status, headers
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model gated/m is restricted. Visit the page to ask for access."}),
    "login": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model login/m is restricted. Please log in."}),
    "private": (401, {}),
    "nobody": (404, {"X-Error-Code": "RepoNotFound"}),
    "down": (503, {}),
    "forbidden": (403, {}),
    "busy": (429, {}),
    "broken": (200, {}),
}


class Asked(NamedTuple):
    "One request."

    method: str
    path: str  # as it was asked for
    file: str  # of the repository; "" for anything else
    range: str  # the header; "" without one


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, place = self.server.hub, self.path.split("?")[0].removeprefix(self.server.hub.prefix)
        stored = place.startswith("/storage/")
        name = place.removeprefix("/storage/") if stored else place.partition("/resolve/")[2].partition("/")[2]
        hub.asked.append(Asked(self.command, self.path, name, self.headers.get("Range", "")))
        if not self.path.startswith(hub.prefix):
            return self._answer(404)
        owner = place.removeprefix("/api/models").split("/")[1]
        if owner in REFUSALS:
            return self._answer(*REFUSALS[owner])
        if not name:
            return self._answer(200, content=self._listing(owner, "/tree/" in place))
        if name not in hub.files():
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        content = (hub.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors") and not stored:  # large files lie elsewhere, and the hub only says where
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"], "Location": f"{hub.prefix}/storage/{name}"}
            return self._answer(302, headers | linked)
        return self._file(name, content, headers)

    def _listing(self, owner, tree):
        files = self.server.hub.files()
        listed = dict(id=f"{owner}/m", sha="0" * 40, siblings=[dict(rfilename=name) for name in files], private=False, downloads=0, tags=[])
        found = [dict(type="file", path=name, size=(self.server.hub.folder / name).stat().st_size, oid="0" * 40) for name in files]
        return json.dumps(found if tree else listed).encode()

    def _file(self, name, content, headers):
        "All of a file, or what a Range header asks for; as much of it as this hub lets through."
        hub, status, asked = self.server.hub, 200, self.headers.get("Range")
        if self.command == "GET" and name in hub.failing:
            return self._answer(500)
        if asked:
            first, size = int(asked.removeprefix("bytes=").split("-")[0]), len(content)
            status, content = 206, content[first:]
            headers = headers | {"Content-Range": f"bytes {first}-{size - 1}/{size}"}
        cut = self.command == "GET" and hub.cuts[name] > 0
        hub.cuts[name] -= cut
        self._answer(status, headers, content, len(content) // 2 if cut else None)

    def _answer(self, status, headers={}, content=b"", sent=None):  # noqa: B006
        self.send_response(status)
        for header, value in ({"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *_):
        pass


class Hub:
    "A served folder: what was asked of it, how often a file is cut in the middle, and which files it fails to give."

    def __init__(self, folder: Path, prefix: str = ""):
        self.folder, self.prefix = folder, prefix
        self.asked, self.cuts, self.failing = [], Counter(), set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.address = f"http://127.0.0.1:{self.server.server_port}{prefix}"

    def files(self):
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def given(self):
        "The files whose content was asked for, with the ranges, in order. The answer that only says where a file lies is none."
        return [(each.file, each.range) for each in self.asked if each.method == "GET" and each.file and not self._elsewhere(each)]

    def _elsewhere(self, asked):
        return asked.file.endswith(".safetensors") and "/storage/" not in asked.path


@contextmanager
def serving(folder: Path, prefix: str = ""):
    "A hub that serves a folder for the length of a block."
    hub = Hub(folder, prefix)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
