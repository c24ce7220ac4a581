"""Settings of the evaluation: what is asked, how it is answered, and by what the answers are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from alignx_ds.config.bounds import OptionalJudgeName, SchemaName, Share, Text
from alignx_ds.mocae.bounds import NonNegativeInt, OneOf, PositiveInt


@dataclass
class SetConfig:
    """Another set of questions that every system answers: XSTest, HoneSet, AlpacaEval, multiple choice …"""

    schema: SchemaName = MISSING
    source: Text = MISSING
    judge: OptionalJudgeName = ""  # empty: nothing is answered, only the gate is measured
    columns: dict[str, Text] = field(default_factory=dict)
    rows: NonNegativeInt = 0  # at most; 0: data.held_out_rows
    only: Annotated[str, OneOf(("", "safe", "unsafe"))] = ""  # of a schema that tells which prompts ask for harm
    # The axes that its prompts need ([generalist]: none), where the rows do not say: the gate is measured on them.
    needs: list[Text] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    # Of an OpenAI-compatible server, e.g. http://localhost:8000/v1: it answers for the systems whose names it lists as
    # models, `batch` prompts at a time; its key is OPENAI_API_KEY. Empty: the run generates all answers itself.
    endpoint: Text = ""
    batch: PositiveInt = 64  # prompts decoded together
    max_new_tokens: PositiveInt = 256
    # Which judges also judge the prompts of other axes: auto (those without a model or a server), all that the recipe
    # names, or none: each judges its own.
    matrix: Annotated[str, OneOf(("auto", "all", "own"))] = "auto"
    best_of: NonNegativeInt = 0  # base and aligned model with the best of so many answers, by the axes' judges; 0: off
    compile: bool = False  # the decode step with torch.compile: faster if many batches are decoded
    sets: dict[str, SetConfig] = field(default_factory=dict)

    @property
    def judges(self) -> dict[str, str]:
        """By extra set, of those that have one."""
        return {name: s.judge for name, s in self.sets.items() if s.judge}


@dataclass
class JudgesConfig:
    """Settings of the judges. Files and addresses are checked only for the judges that the recipe names."""

    endpoint: Text = ""  # of an OpenAI-compatible server, e.g. http://localhost:8000/v1; its key is OPENAI_API_KEY
    endpoint_model: Text = ""  # name of the model that it serves
    endpoint_parallel: PositiveInt = 8  # requests under way at a time
    reference: Text = ""  # of pairwise judges: a JSON list of instruction, output, generator; empty: the rows' own
    moderation: Text = "PKU-Alignment/beaver-dam-7b"  # directory or hub id, like the three below
    guard: Text = "meta-llama/Llama-Guard-3-8B"
    truth: Text = "allenai/truthfulqa-truth-judge-llama2-7B"
    info: Text = "allenai/truthfulqa-info-judge-llama2-7B"
    classifier_rows: Text = ""  # BeaverTails rows that train and test the offline safety judge
    classifier_held_out: Share = 0.15  # share of their questions that test it
    preferences: Text = ""  # AlpacaEval's annotations with outputs, which train and test the offline pairwise judge
    batch: PositiveInt = 8  # answers that a local judge model reads together
