"""Every gate's decision about every prompt, and what each system answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from alignx_ds.study.explain.choices import Choice, choices
from alignx_ds.study.explain.finished import FinishedRun

MIXTURE = "alignx"


@dataclass(frozen=True)
class Explained:
    """One prompt: what each gate chose, the lowest layer's first, and what was answered, by system."""

    prompt: str
    choices: list[Choice]
    answers: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    run: str
    scope: str  # of the gates: shared or per_layer
    prompts: list[Explained]
    silent: dict[str, str]  # the systems that have no answers here, and why


def explain(run: FinishedRun, prompts: list[str]) -> Explanation:
    """The gates' decisions and everybody's greedy answers; one model is in memory at a time."""
    model = run.mixture()
    decided = [choices(model, run.tokenizer, prompt) for prompt in prompts]
    mixed, scope = run.answers(model, prompts), model.config.gate_settings().scope
    del model
    said: dict[str, list[str]] = {}
    silent: dict[str, str] = {}
    for name, specialist in run.specialists():
        if isinstance(specialist, str):
            silent[name] = specialist
        else:
            said[name] = run.answers(specialist, prompts)
    said[MIXTURE] = mixed
    made = [
        Explained(prompt, decided[n], {name: texts[n] for name, texts in said.items()})
        for n, prompt in enumerate(prompts)
    ]
    return Explanation(str(run.out.root), scope, made, silent)


def as_data(explanation: Explanation) -> dict[str, Any]:
    """All numbers, for programs; what is derived from them beside them."""
    data = asdict(explanation)
    for explained, content in zip(explanation.prompts, data["prompts"], strict=True):
        for choice, entry in zip(explained.choices, content["choices"], strict=True):
            entry |= {
                "chosen": choice.chosen.name,
                "runner_up": choice.runner_up.name if choice.runner_up else None,
                "entropy_bits": choice.entropy,
                "most_entropy_bits": choice.most_entropy,
                "margins": choice.margins(),
            }
    return data
