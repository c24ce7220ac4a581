"""What can be counted in an answer to an instruction: length, form, repetition, refusal, overlap, phrases.

The offline pairwise judge compares two answers by the differences of these features.
"""

from __future__ import annotations

import re
import zlib
from math import log1p

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from alignx_ds.evaluation.judges.refusal import LIST_ITEM, SENTENCE_END, classify

WORD = re.compile(r"[a-z0-9']+")
NUMBERED = re.compile(r"^\s*\d+[.)]", re.MULTILINE)
ENDS = tuple(".!?)\"`'}>]")  # an answer that ends otherwise is often cut off
PHRASES = (
    "sorry|cannot|can't|unable|as an ai|i don't|i do not|language model|not able|however|for example|such as|first|"
    "finally|overall|in conclusion|hope this|let me know|you can|it is important|important to|additionally|because|"
    "please provide|could you|more information|###|output:|input:|instruction"
).split("|")
COUNTED = '?!":('
SHORT, LONG = 4.0, 6.0  # logarithms of words below and above which length has a slope of its own


def features(instruction: str, answer: str) -> list[float]:
    """The features of one answer, stripped. Counts are logarithms of one more, so that their differences are ratios."""
    answer = answer.strip()
    low, lines = answer.lower(), [line.strip() for line in answer.split("\n") if line.strip()]
    words, topic = WORD.findall(low), set(WORD.findall(instruction.lower())) - ENGLISH_STOP_WORDS
    sentences = [sentence for sentence in SENTENCE_END.split(answer) if sentence.strip()]
    return [
        log1p(len(answer)),
        log1p(len(words)),
        min(log1p(len(words)), SHORT),
        max(log1p(len(words)) - LONG, 0.0),
        log1p(len(sentences)),
        log1p(len(words) / max(1, len(sentences))),
        *_form(answer, lines),
        *_repetition(answer, lines, words),
        *_content(words, topic),
        *_characters(answer),
        low.startswith(instruction.lower().strip()[:30]),
        classify(answer) != "full_compliance",
        *(phrase in low for phrase in PHRASES),
    ]


def _form(answer: str, lines: list[str]) -> list[float]:
    items = len(LIST_ITEM.findall(answer))
    return [
        log1p(len(lines)),
        log1p(answer.count("\n\n")),
        log1p(items),
        items > 1,
        log1p(len(NUMBERED.findall(answer))),
        "```" in answer,
        "**" in answer,
        answer.endswith(ENDS),
        answer[:1].islower(),
        not answer,
        *(log1p(answer.count(sign)) for sign in COUNTED),
    ]


def _repetition(answer: str, lines: list[str], words: list[str]) -> list[float]:
    threes, packed = list(zip(words, words[1:], words[2:], strict=False)), len(zlib.compress(answer.encode()))
    return [
        len(set(words)) / max(1, len(words)) ** 0.5,
        1 - len(set(threes)) / max(1, len(threes)),
        1 - len(set(lines)) / max(1, len(lines)),
        packed / max(1, len(answer.encode())),
        log1p(packed),
    ]


def _content(words: list[str], topic: set[str]) -> list[float]:
    """How much is said beside stop words, how much of it the instruction named, and to whom it is said."""
    said = set(words) - ENGLISH_STOP_WORDS
    shared = len(topic & said)
    return [
        log1p(len(said)),
        log1p(len(said - topic)),
        shared / max(1, len(topic)),
        shared / max(1, len(said)),
        sum(word in ENGLISH_STOP_WORDS for word in words) / max(1, len(words)),
        sum(map(len, words)) / max(1, len(words)),
        log1p(words.count("you") + words.count("your")),
        log1p(words.count("i") + words.count("my") + words.count("i'm")),
    ]


def _characters(answer: str) -> list[float]:
    """Shares of the characters that are not ASCII, digits, and capitals."""
    length = max(1, len(answer))
    return [
        sum(not c.isascii() for c in answer) / length,
        sum(c.isdigit() for c in answer) / length,
        sum(c.isupper() for c in answer) / length,
    ]
