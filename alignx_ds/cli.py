"""The command line: `alignx-ds run launch/recipes/world.yaml train.lr=1e-3`.

Exit codes: 0 done; 2 something that the user can fix, said in one line per problem; 75 stopped by SIGTERM or SIGUSR1
with everything saved: the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.errors import EXIT_STOPPED, Stopped
from alignx_ds.evaluation.judges.registry import JUDGES
from alignx_ds.export import arguments as export

RUN_HELP = """\
The steps, each reusing what is finished in the output directory:
  specialists   stage 1: one fine-tune per axis under ZeRO-3
  align         stage 2 as well: the mixture of calibrated experts under ZeRO-2
  run           all of it: baselines, answers, judgement and report too

Any key of the recipe can be set on the command line, e.g. train.lr=1e-3 align.ep_size=2 output=runs/mine.
With launch.ranks above 1, and no launcher around it, the command starts that many ranks with `deepspeed`.

Stopped or killed, the same command goes on from the last checkpoint. SIGTERM and SIGUSR1 write one first and exit with
code 75; a second signal exits at once. How many ranks there are may change from one start to the next.
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
        run.add_argument(
            "--dry-run",
            action="store_true",
            help="check all that can be checked without the weights, print the plan, write nothing",
        )
        run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    _add_data_verbs(verbs)
    _add_judge_verbs(verbs)
    export.add_verbs(verbs)
    generate = verbs.add_parser("generate", help="answer prompts with an aligned model", description="Answer prompts.")
    generate.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    generate.add_argument("prompts", nargs="+", help="one answer is printed for each")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    _add_explain_verb(verbs)
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
    _add_study_verb(verbs)
    doctor = verbs.add_parser(
        "doctor",
        help="look at this machine: versions, MPI, accelerator, two real ranks, disk, ports, launchers",
        description="Say what is wrong with this machine and how to fix it. Leaves nothing behind.",
    )
    doctor.add_argument("directory", type=Path, nargs="?", default=Path("runs"), help="where runs go (default: runs)")
    return main


def _add_study_verb(verbs: Any) -> None:
    study = verbs.add_parser(
        "study",
        help="a finished run's figures: drift, forgetting, contributions, calibration",
        description="Measure and draw one of the figures of Axis Collapse, of a finished run. Trains nothing.",
    )
    study.add_argument("what", choices=("drift", "forgetting", "contributions", "calibration"), metavar="WHAT")
    study.add_argument("run_dir", type=Path, help="output directory of a finished run")
    study.add_argument("--out", type=Path, help="where WHAT.json, .png and .pdf go (default: RUN_DIR/study)")


def _add_data_verbs(verbs: Any) -> None:
    data = verbs.add_parser("data", help="look at the rows of a recipe", description="Look at the rows of a recipe.")
    preview = data.add_subparsers(dest="what", required=True, metavar="WHAT").add_parser(
        "preview",
        help="the injected, tokenized and masked rows, counts, lengths, and what is dropped and why",
        description="Show the rows as training sees them. Writes nothing.",
    )
    preview.add_argument("recipe", help="a YAML file; see launch/recipes")
    preview.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that overrule the recipe's")
    preview.add_argument("--rows", type=int, default=2, help="rows shown of each axis (default: %(default)s)")


def _add_explain_verb(verbs: Any) -> None:
    explain = verbs.add_parser(
        "explain",
        help="which expert a prompt goes to, and why, and what every expert would answer",
        description="Print and plot what the gates make of a prompt, and everybody's answers to it.",
    )
    explain.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="output directory of a finished run, e.g. runs/world"
    )
    explain.add_argument("prompts", nargs="+", metavar="PROMPT")
    explain.add_argument("--out", type=Path, metavar="DIR", help="where the plots go (default: RUN_DIR/explain)")
    explain.add_argument("--json", action="store_true", help="print JSON")


def _add_judge_verbs(verbs: Any) -> None:
    answer = verbs.add_parser(
        "answer",
        help="write a model's answers to a set of questions, to be judged later",
        description="Write a model's greedy answers to a set of questions as JSON lines. Goes on where the file ends.",
    )
    answer.add_argument("model", help="directory or hub id of a causal language model, aligned or not")
    answer.add_argument("source", help="a file, or the id of a data set (owner/name, owner/name:config:split)")
    answer.add_argument("--schema", required=True, choices=tuple(SCHEMAS), help="how the source's rows are written")
    answer.add_argument("--out", required=True, type=Path, help="file of answers (.jsonl)")
    answer.add_argument("--rows", type=int, default=0, help="at most so many; 0: all (default)")
    answer.add_argument("--batch", type=int, default=16, help="prompts decoded together (default: %(default)s)")
    answer.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    win_rate = verbs.add_parser(
        "win-rate",
        help="AlpacaEval's win rate and standard error from a file of annotations",
        description="Win rate ± standard error, by AlpacaEval's formula, of its annotations (1 or 2, or weighted).",
    )
    win_rate.add_argument("annotations", type=Path, help="as alpaca_eval or `alignx-ds judge` wrote it (.json)")
    judge = verbs.add_parser(
        "judge",
        help="judge a file of answers",
        description="Judge a file of answers. Verdicts are kept in a file beside it and not asked for twice.",
        epilog="settings are keys of a recipe's `judges`: endpoint=http://localhost:8000/v1 endpoint_model=NAME",
    )
    judge.add_argument("answers", type=Path, help="what `alignx-ds answer` or a run's answers/ holds (.jsonl)")
    judge.add_argument("judge", choices=JUDGES)
    judge.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="what the judge needs")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between the overrides, which argparse alone does not allow."""
    reader = parser()
    args, extra = reader.parse_known_args(arguments)
    options = [text for text in extra if text.startswith("-")]
    rooms = (getattr(args, name, None) for name in ("overrides", "settings", "prompts"))
    room = next((values for values in rooms if isinstance(values, list)), None)
    if options or (extra and room is None):
        reader.error(f"unrecognized arguments: {' '.join(extra)}")
    if room is not None:
        room += extra
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    handlers = {
        "generate": _generate,
        "world": _world,
        "explain": _explain,
        "compare": _compare,
        "data": _preview,
        "answer": _answer,
        "judge": _judge,
        "win-rate": _win_rate,
        "doctor": _doctor,
        "export": export.run,
        "study": _study,
    }
    try:
        return handlers.get(args.verb, _run)(args)
    except Stopped as stopped:
        where = str(stopped)
    except Exception as error:  # noqa: BLE001 - what nobody foresaw is raised again
        from alignx_ds.runtime import distributed

        return distributed.handle_failure(error)
    from alignx_ds.runtime import console, distributed

    console.note(f"stopped in {where}; the same command goes on from there")
    distributed.shutdown()
    return EXIT_STOPPED


def run() -> NoReturn:
    """The program."""
    code = main()
    from alignx_ds.runtime import distributed

    distributed.exit_rank(code)


def _run(args: argparse.Namespace) -> int:
    from alignx_ds import pipeline

    return pipeline.run(args.recipe, args.overrides, until=args.verb, dry_run=args.dry_run)


def _preview(args: argparse.Namespace) -> int:
    from alignx_ds.config import parse
    from alignx_ds.data.inputs import read_inputs
    from alignx_ds.plan import checks
    from alignx_ds.plan.preview import show
    from alignx_ds.runtime import distributed

    settings = parse.load(args.recipe, args.overrides)
    base = checks.check(settings, distributed.planned_world_size(settings.launch.ranks), weights=False)
    show(settings, read_inputs(settings, base), args.rows)
    return 0


def _answer(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation import standalone

    print(standalone.answer(args.model, args.source, args.schema, args.out, args.rows, args.batch, args.max_new_tokens))
    return 0


def _judge(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation import standalone

    standalone.judge(args.answers, args.judge, args.settings)
    return 0


def _win_rate(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation.alpaca_eval import read_annotations, win_rate

    found = win_rate([annotation.preference for annotation in read_annotations(args.annotations)])
    print(f"{found.win_rate:.6f} ± {found.standard_error:.6f} (n = {found.n}, {found.dropped} dropped)")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from alignx_ds.serve.generate import answer

    for text in answer(args.model, args.prompts, args.max_new_tokens):
        print(text)
    return 0


def _explain(args: argparse.Namespace) -> int:
    from alignx_ds.study.explain import command

    command.show(args.run, args.prompts, args.out, as_json=args.json)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from alignx_ds.study import compare

    compare.show(args.runs)
    return 0


def _world(args: argparse.Namespace) -> int:
    from alignx_ds.data.world.files import write_files

    for path in write_files(args.directory, args.rows, args.seed):
        print(path)
    return 0


def _study(args: argparse.Namespace) -> int:
    from alignx_ds.study import command

    command.study(args.what, args.run_dir, args.out)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from alignx_ds.doctor import examine as doctor

    return doctor.show(doctor.examine(args.directory))


if __name__ == "__main__":
    run()
