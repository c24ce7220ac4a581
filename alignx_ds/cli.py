"""The command line: `alignx-ds run launch/recipes/world.yaml train.lr=1e-3`.

Exit codes: 0 done; 1 an unexpected error, or an output that nothing reads; 2 a problem that the user can fix, one line
for each; 75 stopped by SIGTERM or SIGUSR1, 130 by Ctrl-C, with everything saved: the same command continues from there.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from alignx_ds.config import arguments as config
from alignx_ds.data.world import arguments as world
from alignx_ds.doctor import arguments as doctor
from alignx_ds.errors import EXIT_INTERRUPTED, MESSAGE, Stopped, UserError
from alignx_ds.evaluation import arguments as evaluation
from alignx_ds.export import arguments as export
from alignx_ds.plan import arguments as plan
from alignx_ds.runtime import streams
from alignx_ds.runtime.versions import version
from alignx_ds.serve import arguments as serve
from alignx_ds.study import arguments as study

DISTRIBUTED = "alignx_ds.runtime.distributed"  # it imports torch
EXIT_CLOSED_OUTPUT = 1  # as Python's own, when nothing reads the standard output any more
LISTS = ("overrides", "settings", "prompts")  # arguments of any number, between which options may stand
COMPLETING = "_ARGCOMPLETE"  # set by the code of `alignx-ds completion`: the shell asks what may follow
RUN_HELP = """\
Three verbs run the same job up to a step. Each step reuses what is finished in the output directory:
  specialists   stage 1: one fine-tune per axis under ZeRO-3
  align         stage 2 as well: the mixture of calibrated experts under ZeRO-2
  run           everything: baselines, answers, judgement and report too

Any key of the recipe can be set on the command line, e.g. train.lr=1e-3 align.ep_size=2 output=runs/mine.
If launch.ranks is above 1 and no launcher has started this process, it starts that many ranks with `deepspeed`.

After a stop or a crash, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 write a checkpoint
first and exit with code 75, Ctrl-C with 130; a second signal exits at once. The number of ranks may change from one
start to the next.
"""


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="alignx-ds", description="One language model that is helpful, harmless and honest at once, on DeepSpeed."
    )
    main.add_argument("--version", action="version", version=f"alignx-ds {version('alignx-ds')}")
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_run_verbs(verbs)
    for room in (plan, config, world, serve, study, evaluation, export, doctor):
        room.add_verbs(verbs)
    return main


def _add_run_verbs(verbs: Any) -> None:
    for verb, text in (
        ("run", "from a base model to an aligned one, with baselines and report"),
        ("specialists", "stage 1 alone"),
        ("align", "stages 1 and 2"),
    ):
        run = verbs.add_parser(
            verb, help=text, description=text, epilog=RUN_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        plan.add_recipe(run)
        checked = "check everything, of weights the headers if they are there, print the plan, write nothing"
        run.add_argument("--dry-run", action="store_true", help=checked)
        run.add_argument("--show-config", action="store_true", help="with --dry-run: print the resolved config too")
        room = "refuse stages that need more than a GPU of this size has, e.g. 80GiB, and say which settings would fit"
        run.add_argument("--gpu-memory", type=plan.memory_size, metavar="SIZE", help=room)
        run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
        run.set_defaults(work=_run)


def _run(args: argparse.Namespace) -> int:
    from alignx_ds.config import parse

    config = parse.load(args.recipe, args.overrides)  # before the libraries, whose import takes seconds
    gc.disable()  # a tenth of that time is a search for garbage, of which there is none
    from alignx_ds import pipeline

    gc.enable()
    return pipeline.run(
        config,
        [args.recipe, *args.overrides],
        until=args.verb,
        dry_run=args.dry_run,
        show_config=args.show_config,
        gpu_memory=args.gpu_memory,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between the overrides, which argparse alone does not allow."""
    reader = parser()
    args, extra = reader.parse_known_args(arguments)
    given = next((values for values in map(vars(args).get, LISTS) if isinstance(values, list)), None)
    if extra and (given is None or any(text.startswith("-") for text in extra)):
        reader.error(f"unrecognized arguments: {' '.join(extra)}")
    if given is not None:
        given += extra
    if getattr(args, "show_config", False) and not args.dry_run:
        reader.error("--show-config needs --dry-run")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse(arguments)
    try:
        code: int = args.work(args)
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        where, code = str(stopped), stopped.code
    except KeyboardInterrupt as error:
        if loaded := sys.modules.get(DISTRIBUTED):
            return int(loaded.handle_failure(error))
        print(f"{MESSAGE}interrupted", file=sys.stderr)  # while torch was imported, which can't be tried again
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - unexpected errors are raised again
        from alignx_ds.runtime import distributed

        if isinstance(error, BrokenPipeError) and streams.nothing_reads_output():
            if distributed.planned_world_size(1) == 1:
                return EXIT_CLOSED_OUTPUT
            error = UserError("nothing reads the standard output any more; redirect it to a file")
        return distributed.handle_failure(error)
    from alignx_ds.runtime import console, distributed

    console.note(f"stopped in {where}; run the same command again to continue")
    distributed.shutdown()
    return code


def run() -> NoReturn:
    """The program."""
    ended: list[int] = []
    atexit.register(_end, ended)  # the first handler, which is called last
    if COMPLETING in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser())  # ends the process
    streams.prepare()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore it
    code = main()
    streams.finish()
    ended.append(code)
    if loaded := sys.modules.get(DISTRIBUTED):
        loaded.exit_rank(code)
    sys.exit(code)


def _end(ended: list[int]) -> None:
    """Skip the interpreter's teardown, which takes a second for all that torch and transformers have imported."""
    if ended:
        streams.finish()
        os._exit(ended[0])


if __name__ == "__main__":
    run()
