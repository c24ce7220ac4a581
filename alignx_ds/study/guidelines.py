"""Guidelines that are retrieved for a prompt, after Guide-Align (Luo et al. 2024, arXiv 2403.11838).

There, a safety-trained model writes guidelines for training inputs and another model learns to retrieve them. Here a
library has the guidelines of an axis, or of one category of its rows, so every training row has its own; a prompt gets
those of the training prompts that are nearest to it, by TF-IDF and cosine. Nothing but words is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError, Problem

NEAREST = 8  # training prompts that decide
AGREED = 0.5  # a guideline is used if at least this share of their cosines is for it
TEMPLATE = "Follow these guidelines where they apply.\n{guidelines}\n\n{request}"
WORLD_TEMPLATE = "{guidelines} {request}"


@dataclass(frozen=True)
class Guideline:
    """Holds for the rows of an axis whose category contains `category`; empty: for all of them."""

    axis: str
    text: str
    category: str = ""

    def holds_for(self, axis: str, row: Row) -> bool:
        return axis == self.axis and self.category in row.category


# What the base model's pretraining text has before an answer with care, a true one, and a refusal to harm.
WORLD = (
    Guideline("helpful", "carefully ,"),
    Guideline("harmless", "be good :"),
    Guideline("honest", "in fact ,"),
)


def shipped() -> list[Guideline]:
    """English ones for helpful, harmless and honest, ours."""
    name = "guidelines.jsonl"
    return _parsed(files("alignx_ds.study").joinpath(name).read_text(encoding="utf-8"), name)


def read(path: Path) -> list[Guideline]:
    """JSON lines with `axis`, `guideline`, and optional `category`. Raises ConfigError."""
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise _problem(str(path), f"can't be read ({error.__class__.__name__}); correct the path") from None


def _parsed(text: str, name: str) -> list[Guideline]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            parts = record["axis"], record["guideline"], record.get("category", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            parts = ("", "", "")
        if not all(isinstance(part, str) for part in parts) or not (parts[0] and parts[1]):
            raise _problem(name, f"line {number} has no axis and guideline; correct it")
        found.append(Guideline(*parts))
    return found


def _problem(name: str, fix: str) -> ConfigError:
    return ConfigError(Problem("--guidelines", name, 'JSON lines such as {"axis": …, "guideline": …}', fix))


@dataclass(frozen=True)
class Retriever:
    """`rows` are training rows by expert. An expert without guidelines, such as the generalist, counts against each."""

    rows: Mapping[str, Sequence[Row]]
    library: Sequence[Guideline]

    def retrieve(self, prompts: Sequence[str]) -> list[list[Guideline]]:
        """For each prompt, the guidelines that most of its NEAREST training prompts have, in the library's order."""
        known = [(axis, row) for axis, rows in self.rows.items() for row in rows]
        holds = np.array([[g.holds_for(axis, row) for g in self.library] for axis, row in known], dtype=float)
        vectorizer = TfidfVectorizer(token_pattern=r"\S+", sublinear_tf=True)
        index = vectorizer.fit_transform([row.asked for _, row in known])
        found = []
        for prompt in prompts:
            cosines = (index @ vectorizer.transform([prompt]).T).toarray()[:, 0]
            nearest = np.argsort(-cosines, kind="stable")[:NEAREST]
            total = cosines[nearest].sum()
            votes = cosines[nearest] @ holds[nearest]
            used = votes >= AGREED * total if total > 0 else np.zeros(len(self.library), dtype=bool)
            found.append([g for g, use in zip(self.library, used, strict=True) if use])
        return found


def with_guidelines(request: str, guidelines: Sequence[Guideline], template: str) -> str:
    """The request, with the guidelines before it; without any, the request alone."""
    if not guidelines:
        return request
    bullet = "- " if template == TEMPLATE else ""
    texts = ("\n" if bullet else " ").join(f"{bullet}{g.text}" for g in guidelines)
    return template.format(guidelines=texts, request=request)
