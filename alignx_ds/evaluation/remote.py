"""Answers from an OpenAI-compatible server, each written as it comes."""

from __future__ import annotations

from alignx_ds.evaluation.endpoint import Endpoint
from alignx_ds.evaluation.transcripts import AnswerFile
from alignx_ds.runtime import console

ANSWER_SECONDS = 600.0  # per attempt


def ask(server: Endpoint, file: AnswerFile, what: str = "answers") -> None:
    """The answers that the file lacks. Raises DataError where the server does not answer; what it has said is kept."""
    done = len(file.load())
    missing = file.rows[done:]
    asked = ([{"role": turn.role, "content": turn.text} for turn in row.chat] for row in missing)
    with console.progress(what, len(missing)) as progress:
        for number, reply in enumerate(server.ask(asked), done):
            file.append(number, [reply.text.strip()])
            progress.advance()
