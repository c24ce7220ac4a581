"""The `alignx-ds export …` verbs. The work behind them is imported only when one of them is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PUBLISHED = ("hf", "adapters", "dense")  # have a model card, and can be pushed


def add_verbs(verbs: Any) -> None:
    text = "a finished run as a Hugging Face checkpoint, PEFT adapters, a dense model, or files for other evaluators"
    export = verbs.add_parser("export", help=text, description=text[:1].upper() + text[1:] + ".")
    export.set_defaults(work=run)
    what = export.add_subparsers(dest="what", required=True, metavar="WHAT")
    hf = _of_a_run(what, "hf", "the aligned model with its model card", "a new directory")
    hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: %(default)s)")
    _add_publishing(hf)
    text = "each axis's expert as a LoRA adapter (PEFT, vLLM), or several of them as one"
    adapters = _of_a_run(what, "adapters", text, "a new directory")
    _add_choice(adapters, "one adapter of the sum of", required=False)
    _add_measuring(adapters)
    _add_publishing(adapters)
    dense = _of_a_run(what, "dense", "experts merged into a plain model of the backbone's own class", "a new directory")
    _add_choice(dense, "merge", required=True)
    _add_measuring(dense)
    _add_publishing(dense)
    push = what.add_parser("push", help="push an export to the hub", description="Push an export to the hub.")
    push.add_argument("out", type=Path, metavar="OUT", help="directory that `alignx-ds export` has written")
    push.add_argument("push", metavar="OWNER/NAME", help="repository of the hub; private, if it is new")
    _add_visibility(push)
    answers = _of_a_run(what, "answers", "a system's answers as model outputs for alpaca_eval", "a new .json file")
    answers.add_argument("--system", default="alignx", help="whose answers (default: %(default)s)")
    answers.add_argument("--set", required=True, metavar="NAME", help="an axis, or one of evaluation.sets")
    answers.add_argument("--reference", type=Path, help="a file of reference outputs, whose instructions are copied")
    answers.add_argument("--own-references", type=Path, metavar="FILE", help="write the rows' own references here")
    tasks = what.add_parser("lm-eval", help="TruthfulQA's MC1 and MC2 as tasks of lm-evaluation-harness")
    tasks.add_argument("model", help="directory or hub id of the model that will be evaluated")
    tasks.add_argument("source", help="questions with their choices: a file, or the id of a data set")
    tasks.add_argument("out", type=Path, help="a new directory")


def _of_a_run(what: Any, name: str, text: str, out: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = what.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
    made.add_argument("run", type=Path, metavar="RUN_DIR", help="output directory of a finished run, e.g. runs/world")
    made.add_argument("out", type=Path, metavar="OUT", help=out)
    return made


def _add_choice(made: argparse.ArgumentParser, what: str, *, required: bool) -> None:
    chosen = made.add_mutually_exclusive_group(required=required)
    text = f"{what} these axes' experts, several to equal shares, e.g. helpful or helpful,harmless"
    chosen.add_argument("--axes", "--axis", metavar="AXIS,…", help=text)
    text = f"{what} the experts with these weights, e.g. helpful=0.5,honest=0.5"
    chosen.add_argument("--weights", metavar="AXIS=WEIGHT,…", help=text)


def _add_measuring(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts to compare on, one per line (default: the run's)"
    )
    made.add_argument(
        "--rows", type=_positive, default=64, help="at most this many prompts of each set (default: %(default)s)"
    )
    made.add_argument(
        "--max-new-tokens", type=_positive, default=32, help="length of the compared answers (default: %(default)s)"
    )


def _add_publishing(made: argparse.ArgumentParser) -> None:
    made.add_argument("--license", default="", metavar="ID", help="of the export, as the hub spells it: apache-2.0")
    text = "base model on the hub, for the card, where the run had it from a directory"
    made.add_argument("--base-model", default="", metavar="OWNER/NAME", help=text)
    text = "push the export to this repository of the hub, private, with your login (`hf auth login`, HF_TOKEN)"
    made.add_argument("--push", metavar="OWNER/NAME", help=text)
    _add_visibility(made)


def _add_visibility(made: argparse.ArgumentParser) -> None:
    made.add_argument("--public", action="store_true", help="push to a repository that anybody may see")
    text = "instead of pushing, show the repository, the files and their sizes, without the network"
    made.add_argument("--push-dry-run", action="store_true", help=text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from alignx_ds.runtime import distributed
    from alignx_ds.runtime.deepspeed import choose_accelerator

    choose_accelerator()  # save_pretrained imports DeepSpeed
    distributed.silence_libraries()
    if args.what in PUBLISHED:
        _published(args)
    elif args.what == "push":
        from alignx_ds.export import publish

        publish.push(args.out, publish.Repository(args.push, args.public, args.push_dry_run))
    elif args.what == "answers":
        from alignx_ds.export import answers

        answers.export(args.run, args.out, args.system, args.set, args.reference, args.own_references)
    else:
        from alignx_ds.export import tasks

        tasks.export(args.model, args.source, args.out)
    return 0


def _published(args: argparse.Namespace) -> None:
    """An export with a model card, which is pushed if that is asked for."""
    from alignx_ds.errors import ConfigError, Problem
    from alignx_ds.export import adapters, cards, dense, huggingface
    from alignx_ds.export.publish import Repository

    if (args.public or args.push_dry_run) and not args.push:
        given = "--public" if args.public else "--push-dry-run"
        raise ConfigError(Problem(given, None, "--push OWNER/NAME beside it", "say where the export goes"))
    target = Repository(args.push, args.public, args.push_dry_run) if args.push else None
    published = cards.Publication(args.push or args.out.name, args.license, args.base_model)
    published.check()
    if target:
        target.check()
    if args.what == "hf":
        huggingface.export(args.run, args.out, args.max_shard_size, published)
    else:
        export = adapters.export if args.what == "adapters" else dense.export
        chosen = args.axes or args.weights
        export(args.run, args.out, chosen, args.prompts, args.rows, args.max_new_tokens, published)
    if target:
        target.push(args.out)
