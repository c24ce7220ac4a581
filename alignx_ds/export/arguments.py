"""The `alignx-ds export …` verbs. The work behind them is imported only when one of them is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_verbs(verbs: Any) -> None:
    text = "a finished run as a Hugging Face checkpoint, PEFT adapters, a dense model, or files for other evaluators"
    export = verbs.add_parser("export", help=text, description=text[:1].upper() + text[1:] + ".")
    export.set_defaults(work=run)
    what = export.add_subparsers(dest="what", required=True, metavar="WHAT")
    hf = _of_a_run(what, "hf", "the aligned model with its model card", "a new directory")
    hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: %(default)s)")
    text = "each axis's expert as a LoRA adapter (PEFT, vLLM), or several of them as one"
    adapters = _of_a_run(what, "adapters", text, "a new directory")
    _add_choice(adapters, "one adapter of the sum of", required=False)
    _add_measuring(adapters)
    dense = _of_a_run(what, "dense", "experts merged into a plain model of the backbone's own class", "a new directory")
    _add_choice(dense, "merge", required=True)
    _add_measuring(dense)
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


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from alignx_ds.runtime import distributed
    from alignx_ds.runtime.deepspeed import choose_accelerator

    choose_accelerator()  # save_pretrained imports DeepSpeed
    distributed.silence_libraries()
    if args.what == "hf":
        from alignx_ds.export import huggingface

        huggingface.export(args.run, args.out, args.max_shard_size)
    elif args.what == "adapters":
        from alignx_ds.export import adapters

        adapters.export(args.run, args.out, args.axes or args.weights, args.prompts, args.rows, args.max_new_tokens)
    elif args.what == "dense":
        from alignx_ds.export import dense

        dense.export(args.run, args.out, args.axes or args.weights, args.prompts, args.rows, args.max_new_tokens)
    elif args.what == "answers":
        from alignx_ds.export import answers

        answers.export(args.run, args.out, args.system, args.set, args.reference, args.own_references)
    else:
        from alignx_ds.export import tasks

        tasks.export(args.model, args.source, args.out)
    return 0
