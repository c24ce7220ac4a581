"""An explanation on the terminal: tables, and sentences that need no formula."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alignx_ds.runtime import console
from alignx_ds.study.explain.choices import Choice
from alignx_ds.study.explain.explanation import Explained, Explanation

SURENESS = ((0.99, "is certain"), (0.9, "is sure"), (0.6, "leans one way"), (0.0, "is torn"))
BAR = 12  # characters of a full bar
LEGEND = """\
linear    what the router has learned from labelled prompts
fractal   how closely the prompt lies among the expert's own, at several scales
natural   how likely the prompt is under the expert's own distribution of prompts
lexical   what the prompt's words and word pairs say
together  their sum; divided by the post-hoc temperature (÷), it becomes the confidence, a softmax over the experts
That temperature was set on questions kept back from training, so that of many such prompts with a confidence of,
say, 80 % about 80 in 100 go to the right expert; of prompts unlike any that were trained on it promises nothing."""


def show(explanation: Explanation, pictures: list[Path]) -> None:
    for explained in explanation.prompts:
        console.heading(quoted(explained.prompt))
        for choice in explained.choices:
            console.say("\n" + authority(choice, explanation.scope))
            _table(choice)
            console.say("\n".join(sentences(choice)))
        _answers(explained, explanation.silent)
    console.say("\n" + LEGEND)
    console.say("\npicture: " + ", ".join(map(str, pictures)))


def quoted(prompt: str) -> str:
    return "“" + " ⏎ ".join(prompt.splitlines()) + "”"


def authority(choice: Choice, scope: str) -> str:
    """Which gate speaks, and for whom."""
    if scope != "shared":
        return f"Layer {choice.layer} decides for itself (gate.scope=per_layer):"
    layers = [str(layer) for layer in choice.layers]
    named = (
        f"layers {', '.join(layers[:-1])} and {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}, the only one"
    )
    return f"One gate, in layer {choice.layer}, decides for {named} (gate.scope=shared):"


def _table(choice: Choice) -> None:
    terms, has_room = list(choice.chosen.parts), console.is_wide()
    rows = [
        [
            f"{'→' if c.gate > 0 else ' '} {c.name}",
            *map(signed, (*c.parts.values(), sum(c.parts.values()), c.logit)),
            percent(c.confidence),
            *(["█" * round(BAR * c.confidence)] if has_room else []),
        ]
        for c in choice.candidates
    ]
    columns = ["expert", *terms, "together", f"÷ {choice.temperature:.2f}", "confidence", *([""] if has_room else [])]
    console.table("", columns, rows, texts=(0, len(terms) + 4), light=True)


def sentences(choice: Choice) -> Iterator[str]:
    """The decision in words: how sure it is, by how much, and what carried it."""
    chosen, other = choice.chosen, choice.runner_up
    for name in choice.never:
        yield f"{name} has no prompts of its own, so no gate ever chooses it."
    if other is None:
        yield f"There is no other expert to choose than {chosen.name}."
        return
    manner = next(words for least, words in SURENESS if chosen.confidence >= least)
    served = [c for c in choice.candidates if c.gate > 0]
    mixed = " and ".join(f"{percent(c.gate)} {c.name}" for c in served)
    yield (
        f"The gate {manner}: {chosen.name} with {percent(chosen.confidence).replace('> ', 'over ')} confidence, "
        f"{times(chosen.confidence, other.confidence)} as likely as the runner-up, {other.name}."
        + (f" What serves is {mixed}." if len(served) > 1 else "")
    )
    yield (
        f"It hesitates as if between {2**choice.entropy:.2f} of {len(choice.candidates)} experts "
        f"(entropy {choice.entropy:.2f} of at most {choice.most_entropy:.2f} bits)."
    )
    margins = sorted(choice.margins().items(), key=lambda item: -item[1])
    carried = ", ".join(f"{term} {signed(margin)}" for term, margin in margins)
    yield f"Ahead of {other.name} by {sum(choice.margins().values()):.2f}: {carried}."
    if choice.words:
        named = ", ".join(f"“{word.text.strip()}” {signed(word.pull)}" for word in choice.words)
        yield f"Words for {chosen.name} (+) or {other.name} (−): {named}; all else {signed(choice.other_words)}."


def percent(share: float) -> str:
    """Never rounded to certainty, which no softmax over several experts has."""
    if share >= 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def times(more: float, less: float) -> str:
    ratio = more / less if less > 0 else float("inf")
    if ratio >= 1e4:
        return "over 10,000 times"
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _answers(explained: Explained, silent: dict[str, str]) -> None:
    rows = [[name, " ⏎ ".join(text.splitlines()) or "(nothing)"] for name, text in explained.answers.items()]
    console.table("", ["who", "answer"], rows, texts=(0, 1), light=True)
    for name, reason in silent.items():
        console.say(f"no answer of {name}: {reason}")
