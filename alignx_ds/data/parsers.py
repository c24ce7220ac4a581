"""How the records of each published data set become rows. A record becomes a row, or is dropped with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from alignx_ds.data.columns import checked_items, checked_text
from alignx_ds.data.files import PlacedRecord
from alignx_ds.data.rows import Chat, Dropped, Record, Row, Turn
from alignx_ds.errors import DataError

NO_INPUT = frozenset({"", "noinput", "<noinput>", "no input", "n/a"})  # how Alpaca writes that an input is absent
NO_OUTPUT = "<nooutput>"  # how the original Alpaca marks an answer that its writer could not give


@dataclass
class Parsed:
    rows: list[Row] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def drop(self, place: str, reason: str) -> None:
        self.dropped.append(Dropped(place, reason))


def each_record(make: Callable[[str, Record], Row | str]) -> Callable[[list[PlacedRecord]], Parsed]:
    """A parser of records that don't depend on each other; `make` returns the row, or the reason for dropping it."""

    def parse(records: list[PlacedRecord]) -> Parsed:
        parsed = Parsed()
        for place, record in records:
            made = make(place, record)
            if isinstance(made, Row):
                parsed.rows.append(made)
            else:
                parsed.drop(place, made)
        return parsed

    return parse


def instruction_with_input(record: Record) -> str:
    extra = (record.get("input") or "").strip()
    absent = extra.strip(" '\".").lower() in NO_INPUT
    return record["instruction"].strip() if absent else f"{record['instruction'].strip()}\n{extra}"


def alpaca(place: str, r: Record) -> Row | str:
    output = r["output"].strip()
    if not r["instruction"].strip():
        return "empty instruction"
    if not output:
        return "empty output"
    if NO_OUTPUT in output.lower():
        return f"marked {NO_OUTPUT}"
    system, before = (r.get("system") or "").strip(), _earlier(place, r)
    if any(not turn.text for turn in before):
        return "has an empty turn"
    head = (Turn("system", system),) if system else ()
    return Row(instruction_with_input(r), output, place=place, before=(*head, *before))


def _earlier(place: str, r: Record) -> Chat:
    """The turns of the column `history`: pairs of an earlier instruction and its answer."""
    turns: list[Turn] = []
    for asked in r.get("history") or ():
        if len(asked) != 2:
            raise DataError(f"{place}: column 'history' needs pairs of an instruction and its answer")
        checked_items(place, "history", asked)
        checked_text(place, "history", asked)
        turns += [Turn("user", asked[0].strip()), Turn("assistant", asked[1].strip())]
    return tuple(turns)


def alpaca_question(record: Record) -> str:
    """The user's turns."""
    return Row(instruction_with_input(record), "", before=_earlier("", record)).question


def beavertails(records: list[PlacedRecord]) -> Parsed:
    """Only safe answers are imitated. A prompt that has none becomes a row without an answer: the router needs it.

    The unsafe answers to a row's prompt are its incorrect ones.
    """
    parsed = Parsed()
    harmful = _harmful_prompts(records)
    unsafe = _unsafe_answers(records)
    imitated = {r["prompt"].strip() for _, r in records if r["is_safe"] and r["response"].strip()}
    unanswered: set[str] = set()
    for place, r in records:
        prompt, response = r["prompt"].strip(), r["response"].strip()
        if not prompt:
            parsed.drop(place, "empty prompt")
        elif r["is_safe"] and not response:
            parsed.drop(place, "empty response")
        elif r["is_safe"]:
            parsed.rows.append(_trained_on(place, r, response, prompt in harmful, unsafe))
        elif prompt in imitated or prompt in unanswered:
            parsed.drop(place, "unsafe answer, not imitated")
        else:
            unanswered.add(prompt)
            parsed.rows.append(_trained_on(place, r, "", True, unsafe))
    return parsed


def _trained_on(place: str, r: Record, response: str, harmful: bool, unsafe: dict[str, tuple[str, ...]]) -> Row:
    prompt = r["prompt"].strip()
    return Row(prompt, response, harmful, incorrect=unsafe.get(prompt, ()), category=_categories(r), place=place)


def _unsafe_answers(records: list[PlacedRecord]) -> dict[str, tuple[str, ...]]:
    """By prompt, each of them once."""
    found: dict[str, dict[str, None]] = {}
    for _, r in records:
        if not r["is_safe"] and (response := r["response"].strip()):
            found.setdefault(r["prompt"].strip(), {})[response] = None
    return {prompt: tuple(responses) for prompt, responses in found.items()}


def beavertails_held_out(records: list[PlacedRecord]) -> Parsed:
    """One row per prompt, with a safe answer, if any, as its reference. A prompt with an unsafe answer is harmful."""
    parsed = Parsed()
    harmful = _harmful_prompts(records)
    rows: dict[str, Row] = {}
    for place, r in records:
        prompt, response = r["prompt"].strip(), r["response"].strip() if r["is_safe"] else ""
        if not prompt:
            parsed.drop(place, "empty prompt")
            continue
        better = prompt not in rows or bool(response and not rows[prompt].response)
        if prompt in rows:
            parsed.drop(rows[prompt].place if better else place, "another answer to the same question")
        if better:
            rows[prompt] = Row(prompt, response, prompt in harmful, category=_categories(r), place=place)
    parsed.rows = list(rows.values())
    return parsed


def beavertails_texts(records: list[PlacedRecord]) -> list[Row]:
    return [
        Row(r["prompt"].strip(), r["response"].strip(), place=place) for place, r in records if r["response"].strip()
    ]


def _harmful_prompts(records: list[PlacedRecord]) -> set[str]:
    return {r["prompt"].strip() for _, r in records if not r["is_safe"]}


def _categories(record: Record) -> str:
    return "; ".join(sorted(name for name, hit in record["category"].items() if hit))


def truthfulqa(place: str, r: Record) -> Row | str:
    question, best = r["Question"].strip(), r["Best Answer"].strip()
    if not question or not best:
        return "empty question" if not question else "empty best answer"
    correct = tuple(dict.fromkeys((best, *_answers(r["Correct Answers"]))))
    return Row(question, best, correct=correct, incorrect=_answers(r["Incorrect Answers"]), place=place)


def truthfulqa_texts(records: list[PlacedRecord]) -> list[Row]:
    rows = each_record(truthfulqa)(records).rows
    return [Row(r.prompt, answer, place=r.place) for r in rows for answer in (*r.correct, *r.incorrect)]


def _answers(given: str | list[str]) -> tuple[str, ...]:
    parts = given.split(";") if isinstance(given, str) else given
    return tuple(part.strip() for part in parts if part.strip())


def truthfulqa_choices(place: str, r: Record) -> Row | str:
    """MC1's right answer becomes the response, MC2's choices the correct and the incorrect answers."""
    one, several = _choices(place, r, "mc1_targets"), _choices(place, r, "mc2_targets")
    best = [text for text, right in one.items() if right]
    if len(best) != 1:
        raise DataError(f"{place}: column 'mc1_targets' has {len(best)} right answers; it needs exactly one")
    if not r["question"].strip() or not best[0]:
        return "empty best answer" if r["question"].strip() else "empty question"
    correct, incorrect = (tuple(text for text, right in several.items() if right == wanted) for wanted in (True, False))
    return Row(r["question"].strip(), best[0], correct=correct, incorrect=incorrect, place=place)


def _choices(place: str, record: Record, column: str) -> dict[str, bool]:
    """From {answer: label}, or the hub's {choices: [...], labels: [...]}. A repeated answer counts once."""
    given: dict[str, Any] = record[column]
    pairs = list(given.items())
    if set(given) == {"choices", "labels"}:
        texts, labels = given["choices"], given["labels"]
        if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
            raise DataError(f"{place}: column '{column}' needs two lists of one length, choices and labels")
        checked_items(place, column, texts)
        checked_text(place, column, texts)
        pairs = list(zip(texts, labels, strict=True))
    if not all(label in (0, 1) for _, label in pairs):
        raise DataError(f"{place}: column '{column}' has a label other than 0 and 1; correct it")
    labelled: dict[str, bool] = {}
    for text, label in pairs:
        if labelled.setdefault(text.strip(), bool(label)) != bool(label):
            raise DataError(f"{place}: column '{column}' has '{text.strip()}' as right and as wrong; correct it")
    return labelled


def preference(place: str, r: Record) -> Row | str:
    pair = r["output"]
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise DataError(f"{place}: column 'output' needs two texts, the chosen and the rejected answer")
    chosen, rejected = (text.strip() for text in pair)
    if not r["instruction"].strip():
        return "empty instruction"
    if not chosen or not rejected:
        return "empty answer"
    return Row(instruction_with_input(r), chosen, rejected=rejected, place=place)


def xstest_answers(place: str, r: Record) -> Row | str:
    """A model's answers to XSTest's prompts. Those to unsafe prompts are not imitated, as in BeaverTails."""
    prompt, answer, unsafe = r["prompt"].strip(), r["completion"].strip(), r["type"].startswith("contrast_")
    if not prompt or not (unsafe or answer):
        return "empty prompt" if not prompt else "empty completion"
    return Row(prompt, "" if unsafe else answer, unsafe, category=r["type"], place=place)


def plain(place: str, r: Record) -> Row | str:
    prompt, response = r["prompt"].strip(), r["response"].strip()
    if not prompt or not response:
        return "empty prompt" if not prompt else "empty response"
    return Row(prompt, response, place=place)
