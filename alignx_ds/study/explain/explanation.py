"""Every gate's decision about every prompt, and what each system answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from alignx_ds.errors import UserError
from alignx_ds.evaluation.compared import load_base, load_specialist
from alignx_ds.evaluation.generate import answers
from alignx_ds.models.finished import aligned_of, base_of, tokenizer_of
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.study.explain.choices import Choice, choices

BASE, ALIGNED = "base", "alignx"
LOADING_ERRORS = (UserError, OSError, SafetensorError)


@dataclass(frozen=True)
class Explained:
    """One prompt: each gate's decision, the lowest layer's first, and the answers by system."""

    prompt: str
    choices: list[Choice]
    answers: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    run: str
    scope: str  # of the gates: shared or per_layer
    prompts: list[Explained]
    silent: dict[str, str]  # by system without answers: the reason


def explain(run: FinishedRun, prompts: list[str]) -> Explanation:
    """The gates' decisions, and every system's greedy answers. One model is in memory at a time.

    A system that can't be loaded is left out, with the reason. Raises ConfigError or DataError for the aligned model.
    """
    aligned, tokenizer = aligned_of(run), tokenizer_of(run)
    limits, scope = run.config.evaluation, aligned.config.gate_settings().scope

    def answers_of(model: PreTrainedModel) -> list[str]:
        return answers(model, tokenizer, prompts, batch=limits.batch, max_new_tokens=limits.max_new_tokens)

    decisions = [choices(aligned, tokenizer, prompt) for prompt in prompts]
    aligned_answers = answers_of(aligned)
    del aligned
    outputs: dict[str, list[str]] = {}
    silent: dict[str, str] = {}
    try:
        base = base_of(run)
        outputs[BASE] = answers_of(load_base(base))
    except LOADING_ERRORS as error:
        reason = f"the base model {run.config.model.path!r} can't be loaded ({_line(error)})"
        silent = dict.fromkeys((BASE, *run.axes), reason)
    else:
        for axis in run.axes:
            try:
                outputs[axis] = answers_of(load_specialist(base, run.specialist(axis)))
            except LOADING_ERRORS as error:
                silent[axis] = _line(error)
    outputs[ALIGNED] = aligned_answers
    explained = [
        Explained(prompt, decisions[n], {name: texts[n] for name, texts in outputs.items()})
        for n, prompt in enumerate(prompts)
    ]
    return Explanation(str(run.root), scope, explained, silent)


def as_data(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON, with the quantities that are derived from it."""
    data = asdict(explanation)
    for explained, content in zip(explanation.prompts, data["prompts"], strict=True):
        for choice, entry in zip(explained.choices, content["choices"], strict=True):
            entry |= {
                "chosen": choice.chosen.name,
                "serving": [candidate.name for candidate in choice.serving],
                "runner_up": choice.runner_up.name if choice.runner_up else None,
                "entropy_bits": choice.entropy,
                "most_entropy_bits": choice.most_entropy,
                "margins": choice.margins(),
            }
    return data


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
