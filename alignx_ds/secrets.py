"""Keys and passwords: what they look like, so that none is kept in a config or shown in a message."""

from __future__ import annotations

import os
import re

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
SHORTEST = 8  # what is shorter in such a variable is a stand-in like "none", and would be found in common words
HIDDEN = "***"
LOOKS = re.compile(
    r"(?P<before>\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s]+(?=@)"  # https://user:password@host
    r"|(?P<name>[?&][\w-]*(?i:key|token|secret|password)=)[^&\s'\"]+"  # ?api_key=…
    r"|\bhf_[A-Za-z0-9]{30,}"  # the hub's own
    r"|\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"  # OpenAI's
)


def redact(text: str) -> str:
    """The text without the secrets of this environment, and without what looks like one."""
    for name in VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return LOOKS.sub(lambda found: f"{found['before'] or found['name'] or ''}{HIDDEN}", text)


def holds_secret(text: str) -> bool:
    return redact(text) != text
