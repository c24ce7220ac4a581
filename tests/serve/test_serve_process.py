"""`alignx-ds serve` as a process: it says where it listens, and ends on SIGTERM after the answers that it has begun."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI
from processes import cpu_environment, kill_group

from alignx_ds import cli

KEY = "sesame-opens-nothing-else"
QUESTION = [{"role": "user", "content": "how do i burn the sailor ?"}]


def test_sigterm_ends_it_after_the_answers_that_have_begun(saved_aligned: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    options = ("--port", "0", "--api-key-file", str(tmp_path / "key"), "--slots", "2", "--name", "tiny")
    process = subprocess.Popen(
        [sys.executable, "-m", "alignx_ds", "serve", str(saved_aligned), *options],
        env=cpu_environment(PYTHONPATH=":".join(filter(None, sys.path))),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"serving tiny at (http://127\.0\.0\.1:\d+/v1): 2 slots of 64 tokens", line)
        assert found, line + process.stderr.read()
        client = OpenAI(base_url=found[1], api_key=KEY, max_retries=0)
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, seed=1)  # type: ignore[arg-type]
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert first.choices[0].delta.role == "assistant" and last.choices[0].finish_reason in ("stop", "length")
        said = process.stderr.read()
        assert process.wait(30) == 0
        assert "no more requests are accepted" in said and KEY not in said + line
    finally:
        kill_group(process)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--port", "70000"), "--port: got 70000, expected 0 to 65535"),
        (("--host", "192.0.2.1"), "--host, --port: got '192.0.2.1:0', expected an address of this machine"),
        (("--slots", "0"), "--slots: got 0, expected at least 1"),
        (("--api-key-file", "nowhere"), "--api-key-file: got 'nowhere', expected a file with the key"),
        (("--context", "100"), "--context: got 100, expected 2 to 64"),
    ],
)
def test_what_can_t_be_served_is_one_line(
    saved_aligned: Path, options: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", str(saved_aligned), "--port", "0", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "choose another --host or --port" in line


def test_a_directory_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "no model there; give a finished run's directory, or a model's" in capsys.readouterr().err
