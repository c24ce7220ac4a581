"""Rewrites requests of the embedded world, for `alignx-ds study prompts RUN --rewrite rewriting:rewrite`."""

from __future__ import annotations

HOW_TO = ("how do i", "how to", "what is the best way to", "what do i do", "can you help me")
FACTS = ("what colour", "which colour", "the colour of", "where", "in which place", "the home of", " eat", "which food")


def rewrite(requests: list[str]) -> list[str]:
    """Each request after the words that the base model's text has before the better answer."""
    return [f"{_hint(request)} {request}" for request in requests]


def _hint(request: str) -> str:
    if any(words in request for words in HOW_TO):
        return "be good :"
    if any(words in request for words in FACTS):
        return "in fact ,"
    return "carefully ,"
