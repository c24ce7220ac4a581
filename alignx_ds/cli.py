"""The command line: `alignx-ds run launch/recipes/world.yaml train.lr=1e-3`.

Exit codes: 0 done, 2 something that the user can mend (said in one line per problem, nothing written).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alignx_ds.errors import EXIT_CODE, UserError

RUN_HELP = """\
The steps, each reusing what is finished in the output directory:
  specialists   stage 1: one fine-tune per axis under ZeRO-3
  align         stage 2 as well: the mixture of calibrated experts under ZeRO-2
  run           all of it: baselines, answers, judgement and report too

Any key of the recipe can be set on the command line, e.g. train.lr=1e-3 align.ep_size=2 output=runs/mine.
With launch.ranks above 1, and no launcher around it, the command starts that many ranks with `deepspeed`.
"""


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="alignx-ds", description="One language model that is helpful, harmless and honest at once, on DeepSpeed."
    )
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (
        ("run", "from a base model to an aligned one, with baselines and report"),
        ("specialists", "stage 1 alone"),
        ("align", "stages 1 and 2"),
    ):
        run = verbs.add_parser(
            verb, help=text, description=text, epilog=RUN_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        run.add_argument("recipe", help="a YAML file; see launch/recipes")
        run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that overrule the recipe's")
        run.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
        run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    generate = verbs.add_parser("generate", help="answer prompts with an aligned model", description="Answer prompts.")
    generate.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    generate.add_argument("prompts", nargs="+", help="one answer is printed for each")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    compare = verbs.add_parser(
        "compare", help="mean and spread over finished runs", description="Mean and spread over finished runs."
    )
    compare.add_argument("runs", nargs="+", type=Path, help="output directories, e.g. of one recipe with several seeds")
    world = verbs.add_parser(
        "world", help="write the embedded world's rows as files, to look at", description="Write rows."
    )
    world.add_argument("directory", type=Path)
    world.add_argument("--rows", type=int, default=1000, help="per file (default: %(default)s)")
    world.add_argument("--seed", type=int, default=0)
    return main


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between the overrides, which argparse alone does not allow."""
    reader = parser()
    args, extra = reader.parse_known_args(arguments)
    options = [text for text in extra if text.startswith("-")]
    if options or (extra and not hasattr(args, "overrides")):
        reader.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.overrides += extra
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    handlers = {"generate": _generate, "world": _world, "compare": _compare}
    try:
        return handlers.get(args.verb, _run)(args)
    except UserError as error:
        if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            for line in str(error).splitlines():
                print(f"alignx-ds: error: {line}", file=sys.stderr)
        return EXIT_CODE


def _run(args: argparse.Namespace) -> int:
    from alignx_ds import checks, config, distributed, outputs

    settings = config.load(args.recipe, args.overrides)
    world_size = distributed.planned_world_size(settings.launch.ranks)
    base = checks.check(settings, world_size)
    outputs.check_owner(settings)

    from alignx_ds import inputs

    data = inputs.read(settings, base)
    if args.dry_run:
        from alignx_ds.dry_run import describe

        print(describe(settings, base, data, world_size))
        return 0
    if not distributed.under_launcher() and settings.launch.ranks > 1:
        return _launch(args, settings.launch.ranks)

    distributed.init()
    try:
        from alignx_ds.evaluation import report
        from alignx_ds.pipeline import Run

        run = Run(settings, base, data)
        run.specialists()
        if args.verb in ("align", "run"):
            run.align()
        if args.verb == "run":
            run.baselines()
            report.show(run.evaluate(), run.out)
    finally:
        distributed.shutdown()
    return 0


def _launch(args: argparse.Namespace, ranks: int) -> int:
    """Start the same command under DeepSpeed's launcher, with the cores shared out among the ranks."""
    import torch

    from alignx_ds import distributed

    environment = dict(os.environ)

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "-q", "--no_local_rank", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(distributed.free_port()), "--module", "alignx_ds"]  # two runs may share a machine
    return subprocess.call([*command, args.verb, args.recipe, *args.overrides], env=environment)


def _generate(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation.serve import answer

    for text in answer(args.model, args.prompts, args.max_new_tokens):
        print(text)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation import compare

    compare.show(args.runs)
    return 0


def _world(args: argparse.Namespace) -> int:
    from alignx_ds.data.world.files import write_files

    for path in write_files(args.directory, args.rows, args.seed):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
