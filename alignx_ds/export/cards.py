"""Model cards: the README.md of an exported directory, with the front matter that the hub reads.

The licence is left to whoever publishes the model: the base model's and the data's own licences bind them, not us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from alignx_ds.export.fidelity import Fidelity
from alignx_ds.export.runs import FinishedRun

LICENCE = "# license: yours to fill in; the licences of the base model and of the training data bind it\n"


def front_matter(run: FinishedRun, tags: Sequence[str], **more: str) -> str:
    """The hub's metadata. A base model that did not come from the hub is named in words alone."""
    content: dict[str, Any] = {"base_model": run.hub_id} if run.hub_id else {}
    content |= {"pipeline_tag": "text-generation", "tags": ["alignx", *tags], **more}
    return f"---\n{LICENCE}{yaml.safe_dump(content, sort_keys=False)}---\n"


def base_named(run: FinishedRun) -> str:
    """The base model in words."""
    known = {"world": "the small base model that ships with AlignX on DeepSpeed", "scratch": "a base model of its own"}
    given = run.config.model.path
    return known.get(given, f"`{run.hub_id}`" if run.hub_id else "a local base model")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(run: FinishedRun) -> str:
    """What the run measured, from its report."""
    report = run.report
    if report is None:
        return "Not evaluated: the run made the model and stopped (`alignx-ds align`)."
    scored, systems, r = report["scored"], report["systems"], report["router"]
    parts = []
    if scored:
        extra = [name for name in ("avg", "benign_served") if name in systems["alignx"]]
        rows = [[name, *(f"{s[c]:.1f}" for c in (*scored, *extra))] for name, s in systems.items()]
        parts.append("Held-out rows, no hint of the axis in the prompt (0–100, higher is better):\n")
        parts.append(table(["system", *scored, *(e.replace("_", " ") for e in extra)], rows) + "\n")
        judges = ", ".join(f"{axis} by {report['judges'][axis]}" for axis in scored)
        parts.append(f"Judged: {judges}; {report['run']['held_out_rows']} held-out rows per axis at most.\n")
    perplexity = report["perplexity"]
    rows = [[name, *(f"{value:.2f}" for value in p.values())] for name, p in perplexity.items()]
    parts.append("Perplexity of held-out reference answers (lower is better):\n")
    parts.append(table(["system", *perplexity["alignx"]], rows) + "\n")
    parts.append(f"Router: accuracy {r['accuracy']:.3f}, ECE {r['ece']:.3f}, Brier {r['brier']:.3f}.")
    parts.append(
        f"Measured {report['run']['date'][:10]}, seed {report['run']['seed']}, on {report['run']['hardware']}."
    )
    return "\n".join(parts)


NOT_MEASURED = "Not measured: the run has answered no prompts, and none were given (`--prompts FILE`)."
HOW_MEASURED = """\
Relative logits error is ‖logits − the other's‖ / ‖the other's‖ over every token of the aligned model's greedy answers;
token agreement is the share of these tokens' positions at which both find the same token likeliest."""


def compared(found: Mapping[str, Fidelity], what: str) -> str:
    """A line for each; `what` heads the column of their names."""
    rows = [[name, str(f.prompts), f"{f.error:.2e}", f"{f.agreement:.4f}"] for name, f in found.items()]
    columns = [what, "prompts", "relative logits error", "token agreement"]
    return f"{table(columns, rows)}\n\n{HOW_MEASURED}" if found else NOT_MEASURED
