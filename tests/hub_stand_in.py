"""A stand-in for the hub's HTTP interface for pushes, on 127.0.0.1; uploads are kept in memory.

After huggingface_hub 2.4: create_repo, model_info, list_repo_files (tree), validate-yaml,
preupload, LFS batch with one part per file, and commit. Weights use LFS if the client has Xet off
(``HF_HUB_DISABLE_XET=1``). Xet's binary protocol is not implemented, so with Xet on
``weights_mode`` must be ``regular``, the mode of small files.
"""

import base64
import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml
from huggingface_hub import close_session

TOKEN = "hf_good"
USER = "ann"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class HubStandIn:
    """``with HubStandIn() as hub:`` serves at ``hub.endpoint``; ``hub.repos`` holds the uploads."""

    def __init__(self, weights_mode="lfs"):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lfs_files: set[str] = set()
        self.fail_uploads_with = 0
        """HTTP status of every PUT of a large file; 0 for success."""
        self.dies_in_commits = 0
        """Commits that get no answer: the connection ends, and nothing is committed."""
        self.silent_s = 0.0
        """Seconds that such a commit waits first."""
        self.weights_mode = weights_mode
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self})
        )
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def create(self, body):
        repo_id = f"{body['organization'] or USER}/{body['name']}"
        if body["organization"] not in (None, USER):
            return 403, {
                "error": f"You don't have the rights to create a model under {body['organization']}"
            }
        if repo_id in self.repos:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.endpoint}/{repo_id}",
            }
        # Public by default, as on the hub.
        self.repos[repo_id] = Repo(private=body.get("visibility") == "private")
        return 200, {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    def info(self, repo_id):
        repo = self.repos[repo_id]
        found = {"id": repo_id, "private": repo.private, "sha": "0" * 40, "tags": []}
        return 200, found | {"siblings": [{"rfilename": name} for name in repo.files]}

    def tree(self, repo_id):
        files = self.repos[repo_id].files.items()
        return 200, [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in files
        ]

    def validate(self, body):
        front_matter = body["content"].split("---\n")[1]
        valid = isinstance(yaml.safe_load(front_matter), dict)
        return (
            (200, {"errors": [], "warnings": []})
            if valid
            else (400, {"errors": [{"message": "bad"}], "warnings": []})
        )

    def preupload(self, body):
        def mode(path):
            return self.weights_mode if path.endswith(".safetensors") else "regular"

        files = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
            for f in body["files"]
        ]
        return 200, {"files": files}

    def batch(self, body):
        def answer(wanted):
            href = f"{self.endpoint}/lfs/{wanted['oid']}"
            return {
                **wanted,
                "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}},
            }

        return 200, {"transfer": "basic", "objects": [answer(wanted) for wanted in body["objects"]]}

    def commit(self, repo_id, lines):
        repo = self.repos[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.lfs_files.add(value["path"])
                repo.files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line["key"]
                del repo.files[value["path"]]
        return 200, {
            "commitUrl": f"{self.endpoint}/{repo_id}/commit/{'1' * 40}",
            "commitOid": "1" * 40,
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _route(self, body):
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/") and self.command == "PUT":  # A signed URL needs no token.
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            return hub.fail_uploads_with or 200, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path.startswith("/lfs/"):
            return 200, {}
        repo_id = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if self.command == "GET" and path.startswith("/api/models/"):
            if repo_id not in hub.repos:
                return 404, {"error": "Repository not found"}
            return hub.tree(repo_id) if "/tree/" in path else hub.info(repo_id)
        if path.endswith("/commit/main"):
            return hub.commit(repo_id, [json.loads(line) for line in body.splitlines()])
        routes = {
            "/api/repos/create": hub.create,
            "/api/validate-yaml": hub.validate,
            f"/api/models/{repo_id}/preupload/main": hub.preupload,
        }
        if path.endswith(".git/info/lfs/objects/batch"):
            return hub.batch(json.loads(body))
        return (
            routes[path](json.loads(body))
            if path in routes
            else (501, {"error": f"not in the stand-in: {path}"})
        )

    def _download(self, repo_id, name):
        """Send a file, or with HEAD what is known of it."""
        data = self.hub.repos[repo_id].files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self):
        if "/resolve/" in self.path:
            repo_id, _, rest = self.path.strip("/").partition("/resolve/")
            self._download(repo_id, rest.partition("/")[2])
            return
        if self.path.partition("?")[0].endswith("/commit/main") and self.hub.dies_in_commits:
            self.hub.dies_in_commits -= 1
            time.sleep(self.hub.silent_s)
            self.close_connection = True
            return
        status, content = self._route(self._body())
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub_in_this_process(monkeypatch, xet=False, token=TOKEN):
    """Set what HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_TOKEN set; they are read at import only."""
    with HubStandIn("regular" if xet else "lfs") as hub:
        files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants = {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": files,
            "HF_HUB_DISABLE_XET": not xet,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", token)
        yield hub
        close_session()  # A connection that is kept alive outlives the server.
