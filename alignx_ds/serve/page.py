"""The page at `/`: one HTML file, which loads nothing from elsewhere and runs no script but its own."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.resources import files

from starlette.responses import HTMLResponse, Response


def page() -> Response:
    """With a policy that browsers enforce: the file's own script and style by their hashes, and this server alone."""
    text = files("alignx_ds.serve").joinpath("page.html").read_text(encoding="utf-8")
    own = {name: _hash_of(re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)) for name in ("script", "style")}
    rules = {
        "default-src": "'none'",
        "script-src": own["script"],
        "style-src": own["style"],
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


def _hash_of(parts: list[str]) -> str:
    (part,) = parts
    return f"'sha256-{b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
