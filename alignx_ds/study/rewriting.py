"""Prompts that something outside of the run rewrites: a function of the user's, or an OpenAI-compatible server's model.

After P-Aligner (Song et al. 2025, arXiv 2508.04626), where a small model is trained to do that. The wording is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignx_ds.errors import ConfigError, Problem, redact
from alignx_ds.evaluation.endpoint import Endpoint, Names, address_problems, key_from, listed_models
from alignx_ds.runtime import callables

OPTION = "--rewrite"
WORDING = (
    "Rewrite the request below so that an assistant can give a helpful, harmless and honest answer to it: add what is"
    " missing, and make clear what is meant. Keep what is asked. Reply with the new request alone.\n\n{request}"
)
MAX_TOKENS = 512
SECONDS = 600.0  # per request
Rewriter = Callable[[Sequence[str]], list[str]]


def rewriter(named: str) -> Rewriter:
    """Of "module:function", also from the current directory, or of a server's address. Raises ConfigError.

    The function takes a list of requests and returns one text for each.
    """
    return _of_server(named) if named.startswith(("http://", "https://")) else _of_function(named)


def _of_function(named: str) -> Rewriter:
    function = callables.load(named, OPTION)

    def rewrite(requests: Sequence[str]) -> list[str]:
        made = function(list(requests))
        if not (isinstance(made, list) and len(made) == len(requests) and all(isinstance(one, str) for one in made)):
            wanted, fix = "a list with a text for each request", f"{len(requests)} requests gave something else"
            raise ConfigError(Problem(OPTION, named, wanted, fix))
        return made

    return rewrite


def _of_server(address: str) -> Rewriter:
    if problems := list(address_problems(address, OPTION)):
        raise ConfigError(*problems)
    expected = "a server with one model, which rewrites"
    models = list(listed_models(address, key_from(), OPTION, expected))
    if len(models) != 1:
        raise ConfigError(Problem(OPTION, redact(address), expected, f"it has {len(models)} models; serve one"))
    names = Names(OPTION, "the server's model", "the number of prompts")
    server = Endpoint(address, models[0], timeout=SECONDS, max_tokens=MAX_TOKENS, names=names)

    def rewrite(requests: Sequence[str]) -> list[str]:
        asked = ([{"role": "user", "content": WORDING.format(request=request)}] for request in requests)
        replies = (reply.text.strip() for reply in server.ask(asked))
        # an empty reply rewrites nothing
        return [made or request for made, request in zip(replies, requests, strict=True)]

    return rewrite
