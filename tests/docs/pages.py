"""The pages' sections, code blocks and shell commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AT_THE_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = (*AT_THE_TOP, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PROGRAMS = r"(?:alignx-ds|make|python|pip|torchrun|deepspeed|sbatch|srun|mpirun|vllm|hf|alpaca_eval|source|pytest)"
COMMAND = re.compile(  # a program and something to do
    rf'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*(?:(?:\.venv/bin/)?{PROGRAMS}|launch/\w+\.sh) \S'
)
SMALL = (  # appended to a command of the pages that trains: a matter of seconds
    *("launch.ranks=1", "align.ep_size=1", "data.train_rows=80", "data.held_out_rows=12", "baselines.make=[]"),
    *(
        "train.steps=8",
        "train.batch=8",
        "train.warmup_steps=0",
        "align.steps=4",
        "align.batch=8",
        "align.warmup_steps=0",
    ),
    *("gate.latent=8", "gate.output_latent=8", "gate.anchors=8", "experts.rank=4", "experts.feature_rows=16"),
    "evaluation.max_new_tokens=4",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line and without its comment; `beside` is the text that follows it."""

    page: str
    line: str
    beside: str

    @property
    def marked(self) -> bool:
        """Whether the text right after the command names what a test does not have."""
        return re.match(r"\W*needs \w", self.beside) is not None


def read(page: str) -> str:
    return (ROOT / page).read_text()


def text(page: str, title: str) -> str:
    """The section below a heading, up to the next heading of its level or above."""
    marks = ""
    kept, inside = list[str](), False
    for line in read(page).splitlines(keepends=True):
        heading = None if inside else re.match(r"(#+) (.*)", line)
        inside ^= line.startswith("```")
        if heading and marks and len(heading[1]) <= len(marks):
            break
        if marks:
            kept.append(line)
        if heading and heading[2].strip() == title:
            marks = heading[1]
    assert marks, f"{page} has no section {title!r}"
    return "".join(kept)


def code(page: str, title: str, language: str = "python") -> list[str]:
    """The code of a section, in order."""
    return [body for kind, body in FENCE.findall(text(page, title)) if kind == language]


def commands(page: str) -> list[Command]:
    """Every command that the page shows, in a block of bash or within a sentence or a table."""
    whole, found = read(page), list[Command]()
    for language, body in FENCE.findall(whole):
        for line in body.replace("\\\n", " ").splitlines() if language in ("bash", "sh", "console") else ():
            bare, _, comment = line.partition(" # ")
            if bare.strip() and not bare.startswith("#"):
                found.append(Command(page, " ".join(bare.split()), comment))
    for paragraph in re.split(r"\n\s*\n|\n(?=\||- )", FENCE.sub("", whole)):
        spans = [s for s in re.finditer(r"`([^`]+)`", paragraph) if COMMAND.match(" ".join(s[1].split()))]
        for span, following in zip_longest(spans, spans[1:]):
            beside = paragraph[span.end() : following.start() if following else None]
            found.append(Command(page, " ".join(span[1].split()), " ".join(beside.split())))
    return found


def command_with(page: str, part: str) -> str:
    """The only command of the page that contains this."""
    (found,) = [command.line for command in commands(page) if part in command.line]
    return found
