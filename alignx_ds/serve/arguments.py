"""The verbs `generate`, `route` and `serve`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from alignx_ds.data.schemas import SCHEMAS

ROUTE_HELP = """\
Print one JSON line per prompt of a file:
  expert, confidence       the expert that is most likely right, and how likely
  distance                 from the nearest expert's own training prompts; about 1 is typical of them, 2 is far
  probabilities, gates     of every expert; the gates are its weights in the answer
  needs                    of every axis, for a gate of needs (gate.kind: needs)

With --labels, accuracy, ECE, Brier score and NLL follow on stderr, and where the prompts of each expert go.
"""
SERVE_HELP = """\
Serve a model with OpenAI's endpoints /v1/chat/completions, /v1/completions and /v1/models, and /health and /metrics.

Each answer says how its prompt was routed: alignx: {gates, confidence, distance}. The parameter axes, such as
{"harmless": 1}, overrules the gate. The environment variable ALIGNX_API_KEY, or the file that --api-key-file names,
holds the key that clients have to send; without one, nobody is asked for it.

SIGTERM and Ctrl-C end the server after the requests that it has; a second signal ends it at once.
"""


def add_verbs(verbs: Any) -> None:
    generate = verbs.add_parser(
        "generate", help="answer prompts with an aligned model", description="Print a greedy answer to each prompt."
    )
    generate.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    generate.set_defaults(work=_generate)
    route = verbs.add_parser(
        "route",
        help="how an aligned model routes the prompts of a file",
        description=ROUTE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    route.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    route.add_argument("prompts", metavar="FILE", help="a data file, a directory of files, or a data set of the hub")
    route.add_argument(
        "--schema", default="prompts", choices=tuple(SCHEMAS), help="how its rows are written (default: %(default)s)"
    )
    route.add_argument("--labels", default="", metavar="COLUMN", help="the column with the expert that is right")
    route.add_argument("--batch", type=int, default=64, help="prompts read together (default: %(default)s)")
    route.set_defaults(work=_route)
    _add_serve(verbs)


def _add_serve(verbs: Any) -> None:
    serve = verbs.add_parser(
        "serve",
        help="answer OpenAI's requests over HTTP",
        description=SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("model", help="a finished run's directory, an aligned model's, or a dense model's")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    serve.add_argument("--name", default="", help="of the model in requests (default: the directory's)")
    serve.add_argument("--api-key-file", default="", metavar="FILE", help="holds the key that requests must bring")
    serve.add_argument("--slots", type=int, default=16, help="answers decoded together (default: %(default)s)")
    context = "tokens of a prompt and its answer (default: the model's, at most 4096)"
    serve.add_argument("--context", type=int, default=0, metavar="TOKENS", help=context)
    serve.add_argument("--queue", type=int, default=64, help="prompts that may wait (default: %(default)s)")
    serve.add_argument("--max-body", type=int, default=1_000_000, metavar="BYTES", help="(default: %(default)s)")
    router = "decide alone, and let this server answer, which has an adapter for every axis (vLLM: --enable-lora)"
    serve.add_argument("--router-for", default="", metavar="URL", help=router)
    serve.set_defaults(work=_serve)


def _generate(args: argparse.Namespace) -> int:
    from alignx_ds.serve.generate import answer

    print(*answer(args.model, args.prompts, args.max_new_tokens), sep="\n")
    return 0


def _route(args: argparse.Namespace) -> int:
    from alignx_ds.serve.route import route

    route(args.model, args.prompts, args.schema, args.labels, args.batch)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from alignx_ds.serve.server import Settings, serve

    return serve(Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)}))
