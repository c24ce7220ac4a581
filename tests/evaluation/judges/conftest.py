"""No judge of these tests reaches anything but servers on this machine, and none has a key."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _only_local_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
