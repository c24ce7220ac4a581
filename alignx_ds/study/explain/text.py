"""An explanation as text on the terminal: tables, and what they mean in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alignx_ds.runtime import console
from alignx_ds.study.explain.choices import NEEDED, Choice
from alignx_ds.study.explain.explanation import Explained, Explanation

BAR = 12  # characters of a full bar
TERMS = """\
linear      logit of the trained linear router
fractal     density of the expert's training prompts around this prompt, over several scales
natural     log-density of this prompt under a Gaussian fitted to the expert's training prompts
lexical     score of the prompt's words and word pairs
sum         of these terms
logit       sum divided by the post-hoc temperature, which was fitted on the calibration split"""
LEGENDS = {
    "choice": f"""\
{TERMS}
confidence  softmax of the logits over the experts. It is calibrated for prompts like those of the calibration split:
            of those with a confidence of 80 %, about 80 in 100 go to the right expert. It may be wrong for others.""",
    "needs": f"""\
{TERMS}
            Every term is the axis's less the generalist's, so the logit is the log-odds that the prompt needs the axis.
needed      the logistic function of the logit: how likely it is that the prompt needs the axis, whatever else it needs.
            It is calibrated for prompts like those of the calibration split, and may be wrong for others.""",
}


def show(explanation: Explanation, plots: list[Path]) -> None:
    for explained in explanation.prompts:
        console.heading(quoted(explained.prompt))
        for choice in explained.choices:
            console.say("\n" + heading(choice, explanation.scope))
            _table(choice)
            console.say("\n".join(sentences(choice)))
        _answers(explained, explanation.silent)
    console.say("\n" + LEGENDS[explanation.prompts[0].choices[0].kind])
    console.say("\nplot: " + ", ".join(map(str, plots)))


def quoted(prompt: str) -> str:
    return "“" + " ⏎ ".join(prompt.splitlines()) + "”"


def heading(choice: Choice, scope: str) -> str:
    """Which gate decided, and which layers use its decision."""
    if scope != "shared":
        return f"Gate of layer {choice.layer}, used by that layer (gate.scope=per_layer):"
    layers = [str(layer) for layer in choice.layers]
    users = f"layers {', '.join(layers[:-1])} and {layers[-1]}" if len(layers) > 1 else "that layer, the only one"
    return f"Gate of layer {choice.layer}, used by {users} (gate.scope=shared):"


def _table(choice: Choice) -> None:
    terms, has_room = list(choice.chosen.parts), console.is_wide()
    rows = [
        [
            f"{'→' if c in choice.serving else ' '} {c.name}",
            *map(signed, (*c.parts.values(), sum(c.parts.values()), c.logit)),
            percent(c.confidence),
            *(["█" * round(BAR * c.confidence)] if has_room else []),
        ]
        for c in choice.candidates
    ]
    names = ("axis", "needed") if choice.kind == "needs" else ("expert", "confidence")
    columns = [names[0], *terms, "sum", "logit", names[1], *([""] if has_room else [])]
    console.table("", columns, rows, texts=(0, len(terms) + 4), light=True)


def sentences(choice: Choice) -> Iterator[str]:
    """The decision in words: the chosen expert, how certain the choice is, and which terms it comes from."""
    chosen, other = choice.chosen, choice.runner_up
    yield f"Post-hoc temperature: {choice.temperature:.2g}."
    for name in choice.never:
        yield f"The expert {name} has no training rows, so the gate never chooses it."
    if choice.kind == "needs":
        yield from _needs(choice)
        return
    if other is None:
        yield f"The expert {chosen.name} is the only one with training rows."
        return
    confidence = percent(chosen.confidence).replace("> ", "over ")
    ratio = times(chosen.confidence, other.confidence)
    yield f"Chosen expert: {chosen.name}, with {confidence} confidence, {ratio} that of the runner-up, {other.name}."
    served = [c for c in choice.candidates if c.gate > 0]
    if len(served) > 1:
        yield f"Weights in the output: {' and '.join(f'{percent(c.gate)} {c.name}' for c in served)}."
    yield (
        f"Effective number of experts: {2**choice.entropy:.2f} of {len(choice.candidates)} "
        f"(entropy {choice.entropy:.2f} of at most {choice.most_entropy:.2f} bits)."
    )
    yield from _margin(choice, other.name)


def _needs(choice: Choice) -> Iterator[str]:
    """Which axes are needed, what they add to the base model, and where the need of the first comes from."""
    needed = [c for c in choice.candidates if c.confidence >= NEEDED]
    others = [c for c in choice.candidates if c not in needed]
    parts = [
        f"{what}: {', '.join(f'{c.name} ({percent(c.confidence)})' for c in axes)}"
        for what, axes in (("Needed", needed), ("not needed", others))
        if axes
    ]
    yield f"{'; '.join(parts)}." if needed else f"No axis is needed; {parts[0]}."
    served = [c for c in choice.candidates if c.gate > 0]
    unserved = [c.name for c in needed if c.gate == 0]
    if unserved:
        yield f"Not served, because of gate.top_k: {', '.join(unserved)}."
    yield f"Added to the base model: {', '.join(f'{percent(c.gate)} of {c.name}' for c in served) or 'nothing'}."
    count, most = len(choice.candidates), choice.most_entropy
    yield f"Entropy of the {count} decisions: {choice.entropy:.2f} of at most {most:.2f} bits."
    yield from _margin(choice, "the generalist")


def _margin(choice: Choice, other: str) -> Iterator[str]:
    """The chosen expert's margin over the other one's sum by term, and the words in it."""
    margins = sorted(choice.margins().items(), key=lambda item: -item[1])
    by_term = ", ".join(f"{term} {signed(margin)}" for term, margin in margins)
    of = f" of {choice.chosen.name}" if choice.kind == "needs" else ""
    yield f"Margin of the sum{of} over that of {other}: {sum(choice.margins().values()):.2f} ({by_term})."
    if choice.words:
        words = ", ".join(f"“{word.text.strip()}” {signed(word.pull)}" for word in choice.words)
        yield (
            f"Words and word pairs in the lexical margin, for {choice.chosen.name} (+) or {other} (−): {words}; "
            f"all others and the bias {signed(choice.other_words)}."
        )


def percent(share: float) -> str:
    """Never rounded to 0 % or 100 %, which a softmax over several experts does not reach."""
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
    rows = [[name, " ⏎ ".join(text.splitlines()) or "(empty)"] for name, text in explained.answers.items()]
    console.table("", ["system", "answer"], rows, texts=(0, 1), light=True)
    for name, reason in silent.items():
        console.say(f"no answer from {name}: {reason}")
