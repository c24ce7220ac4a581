"""What the shell offers at the tab key, asked as the code of `alignx-ds completion` asks it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from alignx_ds import cli
from alignx_ds.config.arguments import SHELLS

argcomplete = pytest.importorskip("argcomplete")


class EndedError(Exception):
    pass


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    monkeypatch.chdir(repo_root)
    for name, value in (("", "1"), ("_SHELL", "bash"), ("_IFS", "\n"), ("_COMP_WORDBREAKS", " \t\n\"'><=;|&(:")):
        monkeypatch.setenv(f"{cli.COMPLETING}{name}", value)


def refuse(*given: object) -> None:
    raise OSError


def offered(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setattr("os.fdopen", refuse)  # argcomplete would take file descriptor 9, which is pytest's
    out = io.StringIO()

    def end(code: int = 0) -> None:
        raise EndedError

    with pytest.raises(EndedError):
        argcomplete.autocomplete(cli.parser(), exit_method=end, output_stream=out)
    return [found.strip() for found in out.getvalue().split("\n") if found]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ex", ["explain", "export"]),
        ("export hf --push-", ["--push-dry-run"]),
        ("run world-o", ["world-opposites"]),
        ("run launch/recipes/world-o", ["launch/recipes/world-opposites.yaml"]),
        ("run world seed=1 train.lr", ["train.lr="]),
        ("run world axes.honest.pro", ["axes.honest.prompt="]),
        ("run nowhere.yaml seed=1 nonf", ["nonfinite="]),
        ("run world nonfinite=s", ["stop", "skip"]),  # bash takes what follows an = for a word of its own
        ("run world baselines.tune=", ["true", "false"]),
    ],
)
def test_what_may_follow_is_offered(typed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(f"alignx-ds {typed}", monkeypatch) == expected


@pytest.mark.parametrize("shell_name", SHELLS)
def test_the_verb_prints_code_for_the_shell(shell_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell_name]) == 0
    printed = capsys.readouterr().out
    assert "alignx-ds" in printed and cli.COMPLETING in printed
    assert ("complete --command alignx-ds" in printed) == (shell_name == "fish")


def test_the_program_answers_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it reads its arguments; other commands never import argcomplete."""
    asked = []

    def autocomplete(parser: object) -> None:
        asked.append(parser)
        raise EndedError

    monkeypatch.setattr("argcomplete.autocomplete", autocomplete)
    with pytest.raises(EndedError):
        cli.run()
    assert len(asked) == 1
