"""A stand-in for the W&B backend on loopback: as much of its protocol as one online run needs.

The wandb package has no fake server, and the real one needs an account. This one answers the client
of wandb 0.31 (GraphQL, file_stream, uploads) and keeps what arrives for tests to examine.
"""

import base64
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "0123456789" * 4
ENTITY = "tester"


class FakeServer:
    """A context manager; `runs`, `streams` and `files` grow as a client sends them."""

    def __init__(self) -> None:
        # By run id: the variables of UpsertBucket, later ones replacing earlier ones.
        self.runs: dict[str, dict[str, Any]] = {}
        # By run id, file name and line number: the lines.
        self.streams: dict[str, dict[str, dict[int, str]]] = {}
        self.exit_codes: dict[str, int] = {}
        self.files: dict[str, bytes] = {}  # uploads, by "run id/name" or "artifact/name"
        self.operations: list[str] = []  # of GraphQL, in order of arrival
        self.stalled = threading.Event()  # set: connections are accepted and never answered
        self.refusing = threading.Event()  # set: no run may be written
        self.closed = threading.Event()
        handler = type("BoundHandler", (Handler,), {"backend": self})
        self._http = Listener(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: connections are refused from now on, and pending answers are dropped."""
        if not self.closed.is_set():
            self.closed.set()
            self._http.shutdown()
            self._http.server_close()

    # ---- what a run sent

    def config(self, run_id: str) -> dict[str, Any]:
        """The run's configuration, without wandb's own entry and its {"value": ...} wrapping."""
        wrapped = json.loads(self.runs[run_id]["config"])
        return {name: entry["value"] for name, entry in wrapped.items() if name != "_wandb"}

    def history(self, run_id: str) -> list[dict[str, Any]]:
        return self._lines(run_id, "wandb-history.jsonl")

    def summary(self, run_id: str) -> dict[str, Any]:
        """The last summary that was streamed."""
        return (self._lines(run_id, "wandb-summary.json") or [{}])[-1]

    def _lines(self, run_id: str, name: str) -> list[dict[str, Any]]:
        numbered = self.streams.get(run_id, {}).get(name, {})
        return [json.loads(numbered[number]) for number in sorted(numbered)]

    # ---- answers

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = operation[1] if operation else ""
        self.operations.append(name)
        match name:
            case "Viewer":
                viewer = {"id": "user", "entity": ENTITY, "username": ENTITY, "email": None}
                return {"viewer": viewer | {"flags": "{}", "teams": {"edges": []}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunResumeStatus":
                return {"model": self._resume_status(variables["name"])}
            case "UpsertBucket" if self.refusing.is_set():
                raise LookupError("permission denied")
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(variables)}
            case "CreateRunFiles":
                run_id, names = variables["run"], variables["files"]
                url = f"{self.url}/upload/{run_id}"
                files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in names]
                return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
            case "MarkRunFilesUploaded":
                return {"markRunFilesUploaded": {"success": True}}
            case "ArtifactType":  # of an artifact of this name: there is none yet
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                artifact = {"id": variables["input"]["artifactCollectionName"], "state": "PENDING"}
                artifact |= {"artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                manifest = self._manifest(variables["artifactID"])
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "UpdateArtifactManifest":
                manifest = self._manifest(variables["artifactManifestID"])
                return {"updateArtifactManifest": {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                specs = variables["input"]["artifactFiles"]
                edges = [{"node": self._artifact_file(spec)} for spec in specs]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                artifact = {"id": variables["artifactID"], "digest": ""}
                return {"commitArtifact": {"artifact": artifact}}
            case _:
                raise LookupError(f"{name or query}: not an operation of this stand-in")

    def _manifest(self, artifact: str) -> dict[str, Any]:
        url = f"{self.url}/upload/{artifact}/manifest.json"
        file = {"id": "file", "uploadUrl": url, "uploadHeaders": []}
        return {"id": artifact, "file": file}

    def _artifact_file(self, spec: dict[str, Any]) -> dict[str, Any]:
        path = f"{spec['artifactID']}/{spec['name']}"
        upload = {"uploadUrl": f"{self.url}/upload/{path}", "uploadHeaders": []}
        file = {"storagePath": path, "artifact": {"id": spec["artifactID"]}}
        return file | upload | {"uploadMultipartUrls": None}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        inserted = run_id not in self.runs
        run = self.runs.setdefault(run_id, {})
        run.update({name: value for name, value in variables.items() if value is not None})
        return {"bucket": self._bucket(run_id), "inserted": inserted}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        entity = {"id": "entity", "name": ENTITY}
        return {
            "id": base64.b64encode(run_id.encode()).decode(),
            "name": run_id,
            "displayName": run.get("displayName") or run_id,
            "description": None,
            "config": run.get("config", "{}"),
            "sweepName": None,
            "project": {"id": "project", "name": run["project"], "entity": entity},
            "historyLineCount": len(self.streams.get(run_id, {}).get("wandb-history.jsonl", {})),
        }

    def _resume_status(self, run_id: str) -> dict[str, Any]:
        entity = {"id": "entity", "name": ENTITY}
        model = {"id": "project", "name": "project", "entity": entity, "bucket": None}
        if run_id in self.runs:
            history = self.history(run_id)
            model["bucket"] = self._bucket(run_id) | {
                "summaryMetrics": json.dumps(self.summary(run_id)),
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(line) for line in history[-1:]]),
                "eventsTail": "[]",
                "tags": [],
                "notes": None,
                "wandbConfig": '{"t": 1}',  # without "t" a run counts as never started
            }
        return model

    def file_stream(self, run_id: str, sent: dict[str, Any]) -> dict[str, Any]:
        run = self.streams.setdefault(run_id, {})
        for name, chunk in sent.get("files", {}).items():
            numbered = run.setdefault(name, {})
            numbered.update({chunk["offset"] + i: line for i, line in enumerate(chunk["content"])})
        if sent.get("complete"):
            self.exit_codes[run_id] = sent["exitcode"]
        return {"exitcode": None, "limits": {}}


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Ignore clients that went away."""


class Handler(BaseHTTPRequestHandler):
    backend: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if stream:
            self._answer(self.backend.file_stream(stream[1], json.loads(body)))
        elif self.path == "/graphql":
            sent = json.loads(body)
            try:
                data = self.backend.graphql(sent["query"], sent.get("variables") or {})
                self._answer({"data": data})
            except LookupError as error:
                self._answer({"data": None, "errors": [{"message": str(error)}]})
        else:
            self._answer({"error": f"unknown path {self.path}"}, 404)

    def do_PUT(self) -> None:
        self.backend.files[self.path.removeprefix("/upload/")] = self._body()
        self._answer({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        while self.backend.stalled.is_set() and not self.backend.closed.is_set():
            time.sleep(0.05)
        if self.backend.closed.is_set():
            self.close_connection = True  # one that is kept alive outlives the listening socket
            return
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
