"""Model cards: the README.md of an exported directory, with the front matter that the hub reads.

The licence is for whoever publishes the model to say, since it depends on those of the base model and of the data.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from alignx_ds.config.schema import SCRATCH_MODEL, WORLD_MODELS
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.export.fidelity import Fidelity
from alignx_ds.export.licences import LICENCES
from alignx_ds.export.measured import table
from alignx_ds.export.publish import hub_name
from alignx_ds.runs.finished import FinishedRun

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+|[\w-]+")
LICENCE = "# license: yours to fill in; it has to agree with the licences of the base model and of the training data\n"


@dataclass(frozen=True)
class Publication:
    """What a card says that the run does not know."""

    name: str  # from which the export is loaded: a repository of the hub, or the directory's name
    licence: str = ""  # one of LICENCES; empty: none is named
    base: str = ""  # the base model's id on the hub, where the run had it from a directory

    def check(self) -> None:
        """Raises ConfigError for a licence or a base model that the hub would not accept."""
        if self.licence and self.licence not in LICENCES:
            close = difflib.get_close_matches(self.licence, LICENCES, n=1)
            fix = f"did you mean '{close[0]}'?" if close else "for one without an identifier write other"
            raise ConfigError(Problem("--license", self.licence, "an identifier of the hub's, as apache-2.0", fix))
        if self.base:
            hub_name("--base-model", self.base)


def base_name(run: FinishedRun, published: Publication) -> str:
    """The base model's id on the hub as far as it is known; of a local one no more than the directory's name."""
    known = {**{name: name for name in WORLD_MODELS}, SCRATCH_MODEL: run.out.base.name}
    given = run.config.model.path
    return hub_id(run, published) or known.get(given) or Path(given).resolve().name


def hub_id(run: FinishedRun, published: Publication) -> str | None:
    """The base model's name on the hub, when it is said or comes from there."""
    given = run.config.model.path
    local = given in (*WORLD_MODELS, SCRATCH_MODEL) or Path(given).is_dir() or not HUB_ID.fullmatch(given)
    return published.base or (None if local else given)


def front_matter(
    run: FinishedRun,
    published: Publication,
    library: str,
    tags: Sequence[str],
    relation: str,
    results: Sequence[EvalResult] = (),
) -> str:
    """The hub's metadata. `relation` to the base model, which is named when it is on the hub: finetune or adapter."""
    named = hub_id(run, published)
    data = ModelCardData(
        base_model=named,
        base_model_relation=relation if named else None,
        library_name=library,
        license=published.licence or None,
        pipeline_tag="text-generation",
        tags=["alignx", *tags],
        model_name=published.name if results else None,
        eval_results=list(results) or None,
    )
    return f"---\n{'' if published.licence else LICENCE}{data.to_yaml()}\n---\n"


def base_named(run: FinishedRun, published: Publication) -> str:
    """The base model in words."""
    known = {
        **dict.fromkeys(WORLD_MODELS, "a small base model that ships with AlignX on DeepSpeed"),
        SCRATCH_MODEL: "a small base model that the run trained from scratch",
    }
    named = hub_id(run, published)
    return f"`{named}`" if named else known.get(run.config.model.path, "a local base model")


MEASURED = "## The run: the aligned model, its specialists and the baselines"
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
