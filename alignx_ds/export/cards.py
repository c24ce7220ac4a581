"""Model cards: the README.md of an exported directory, with the front matter that the hub reads.

The licence is left to whoever publishes the model, since it depends on the licences of the base model and of the data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignx_ds.config.schema import SCRATCH_MODEL, WORLD_MODELS
from alignx_ds.evaluation.judges.protocol import BESIDE, label
from alignx_ds.export.fidelity import Fidelity
from alignx_ds.runs.finished import FinishedRun

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+|[\w-]+")
LICENCE = "# license: yours to fill in; it has to agree with the licences of the base model and of the training data\n"


def base_name(run: FinishedRun) -> str:
    """The base model's id on the hub as the recipe has it; of a local one no more than the directory's name."""
    known = {**{name: name for name in WORLD_MODELS}, SCRATCH_MODEL: run.out.base.name}
    given = run.config.model.path
    return hub_id(run) or known.get(given) or Path(given).resolve().name


def hub_id(run: FinishedRun) -> str | None:
    """The base model's name on the hub, when it comes from there."""
    given = run.config.model.path
    local = given in (*WORLD_MODELS, SCRATCH_MODEL) or Path(given).is_dir() or not HUB_ID.fullmatch(given)
    return None if local else given


def front_matter(run: FinishedRun, tags: Sequence[str], **more: str) -> str:
    """The hub's metadata; it names the base model when that is on the hub."""
    named = hub_id(run)
    content: dict[str, Any] = {"base_model": named} if named else {}
    content |= {"pipeline_tag": "text-generation", "tags": ["alignx", *tags], **more}
    return f"---\n{LICENCE}{yaml.safe_dump(content, sort_keys=False)}---\n"


def base_named(run: FinishedRun) -> str:
    """The base model in words."""
    known = {
        **dict.fromkeys(WORLD_MODELS, "a small base model that ships with AlignX on DeepSpeed"),
        SCRATCH_MODEL: "a small base model that the run trained from scratch",
    }
    named = hub_id(run)
    return known.get(run.config.model.path, f"`{named}`" if named else "a local base model")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(run: FinishedRun) -> str:
    """What the run measured, from its report."""
    report = run.report
    if report is None:
        return "Not evaluated: the model was made by `alignx-ds align`, which does not measure it."
    scored, systems, r = report["scored"], report["systems"], report["router"]
    parts = []
    if scored:
        extra = [name for name in ("avg", *BESIDE) if name in systems["alignx"]]
        rows = [[name, *(f"{s[c]:.1f}" for c in (*scored, *extra))] for name, s in systems.items()]
        parts.append("Held-out rows, no hint of the axis in the prompt (0–100, higher is better):\n")
        parts.append(table(["system", *scored, *map(label, extra)], rows) + "\n")
        judges = ", ".join(f"{axis} by {report['judges'][axis]}" for axis in scored)
        parts.append(f"Judges: {judges}; at most {report['run']['held_out_rows']} held-out rows per axis.\n")
    perplexity = report["perplexity"]
    rows = [[name, *(f"{value:.2f}" for value in p.values())] for name, p in perplexity.items()]
    parts.append("Perplexity of held-out reference answers (lower is better):\n")
    parts.append(table(["system", *perplexity["alignx"]], rows) + "\n")
    parts.append(f"Router: accuracy {r['accuracy']:.3f}, ECE {r['ece']:.3f}, Brier {r['brier']:.3f}.")
    parts.append(
        f"Measured {report['run']['date'][:10]}, seed {report['run']['seed']}, on {report['run']['hardware']}."
    )
    return "\n".join(parts)


NOT_MEASURED = "Not measured: the run has no answers (`alignx-ds align`), and no `--prompts FILE` was given."
HOW_MEASURED = """\
Both models predict every token of the aligned model's own greedy answers. Relative logits error: ‖z − z′‖ / ‖z′‖, where
z′ are the aligned model's logits. Token agreement: the share of the tokens which both models predict alike."""


def comparison(found: Mapping[str, Fidelity], what: str) -> str:
    """A table with a row for each measured difference; `what` is the heading of their names."""
    if not found:
        return NOT_MEASURED
    rows = [[name, str(f.prompts), f"{f.error:.2e}", f"{f.agreement:.4f}"] for name, f in found.items()]
    columns = [what, "prompts", "relative logits error", "token agreement"]
    return f"{table(columns, rows)}\n\n{HOW_MEASURED}"
