"""The part of the hub's HTTP interface with which its client makes a repository and sends files, in this process."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_" + "t" * 34


@dataclass
class Hub:
    """Repositories by name, each with its visibility and files, and every request as (method, path)."""

    role: str = "write"
    refuses: str = ""  # a part of a path: such requests get code 403
    invalid: str = ""  # what is wrong with every card
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)  # that were to be validated
    requests: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Code and JSON."""
        parts = path.strip("/").split("/")[1:]  # after api/
        if self.refuses and self.refuses in path:
            return 403, {"error": "not allowed"}
        match method, parts:
            case "GET", ["whoami-v2"]:
                return 200, {"name": "me", "auth": {"accessToken": {"role": self.role}}}
            case "POST", ["validate-yaml"]:
                self.cards.append(json.loads(body)["content"])
                return (400, {"errors": [{"message": self.invalid}]}) if self.invalid else (200, {"warnings": []})
            case "POST", ["repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted.get('organization', 'me')}/{wanted['name']}"
                made = {"url": f"https://huggingface.co/{name}", "name": name}
                if name in self.private:
                    return 409, made
                self.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
                return 200, made
            case _, ["models", owner, name, *rest] if f"{owner}/{name}" in self.private:
                return self._of_repository(f"{owner}/{name}", rest, body)
        return 404, {"error": "Repository not found"}

    def _of_repository(self, name: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        there = self.files.setdefault(name, {".gitattributes": b""})
        match rest:
            case ["tree", *_]:
                return 200, [
                    {"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in there.items()
                ]
            case ["preupload", *_]:
                asked = json.loads(body)["files"]
                return 200, {
                    "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                }
            case ["commit", *_]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        there[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del there[line["value"]["path"]]
                return 200, {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"https://huggingface.co/{name}/commit/1",
                }
        return 200, {"id": name, "private": self.private[name], "siblings": [], "sha": "1" * 40}


def served(hub: Hub) -> ThreadingHTTPServer:
    """A server of this hub on a free port of the loopback. Who calls it starts and stops it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            code, content = hub.answer(self.command, path, body) if known else (401, {"error": "Invalid token"})
            data = json.dumps(content).encode()
            self.send_response(code)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - the names that the server looks for

        def log_message(self, *parts: Any) -> None:
            """Nothing: the terminal is the command's."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)
