"""Every command of the README and the pages is run here, is run by another named test, or is marked with what it needs.

The mark is `(needs …)` right after a command in a sentence, or `# needs …` after one in a block.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Command, commands

from alignx_ds import cli

Workplace = Callable[[], Path]
pytestmark = pytest.mark.usefixtures("no_launcher")
WORDS = {  # the pages' placeholders
    "RECIPE": "launch/recipes/world.yaml",
    "RUN": "runs/world",
    "MODEL": "runs/world/model",
    "DIRECTORY": "runs",
    "SOURCE": "mc_task.json",
    "ANSWERS": "xstest.jsonl",
}
TESTED = {  # commands that other tests run, by how they begin
    "alignx-ds run launch/recipes/world.yaml gate.more.nearest=": (
        "tests/docs/test_new_calibrator.py::test_it_is_a_term_of_the_saved_model_s_gate"
    ),
    "alignx-ds study": (
        "tests/study/test_study_command.py::test_a_study_records_its_provenance_and_does_not_change_the_run"
    ),
    "alignx-ds completion": "tests/config/test_completion.py::test_the_verb_prints_code_for_the_shell",
    "source <(alignx-ds completion": "tests/config/test_completion.py::test_the_verb_prints_code_for_the_shell",
    "alignx-ds config-schema": "tests/config/test_json_schema.py::test_the_verb_prints_the_schema",
    "alignx-ds doctor": "tests/doctor/test_doctor.py::test_a_healthy_machine_passes_and_nothing_is_left_behind",
    "alignx-ds serve": ("tests/serve/test_serve_process.py::test_sigterm_ends_it_after_the_answers_that_have_begun"),
    "launch/mpi.sh": "tests/launchers/test_launchers.py::test_mpirun_makes_what_deepspeed_makes",
    "launch/multinode.sh": "tests/launchers/test_two_hosts.py::test_both_stages_make_what_they_make_on_one_node",
    "torchrun --nproc_per_node": "tests/launchers/test_launchers.py::test_torchrun_makes_what_deepspeed_makes",
    "sbatch launch/slurm.sh": "tests/launchers/test_slurm.py::test_it_makes_what_deepspeed_makes",
    "sbatch --nodes": "tests/launchers/test_slurm.py::test_it_makes_what_deepspeed_makes",
    "sbatch --array": "tests/launchers/test_slurm.py::test_every_task_is_a_rank_and_an_array_has_its_numbers",
    ".venv/bin/alignx-ds export hf": "tests/docs/test_three_commands.py::test_an_exported_model_answers",
    ".venv/bin/python -c": "tests/docs/test_three_commands.py::test_an_exported_model_answers",
}
TRAINS = ("run", "align", "specialists")
FEW = "data.train_rows=80 data.held_out_rows=12"  # reading all rows of the world takes seconds
ELSEWHERE = f"{FEW} output=runs/elsewhere --dry-run"  # runs/world holds the tiny run, and another is refused there
READS = re.compile(r"--dry-run$|--help$| -n$|data preview ")  # what changes nothing, and needs one try for all pages
ASKS_A_SERVER = re.compile(r"alignx-ds judge \S+ (alpaca_eval|honeset)$")


def test_named_tests_are_there() -> None:
    for place in TESTED.values():
        file, name = place.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), place


def line_to_run(command: Command, number: int) -> str | None:
    """The line that is run for a command, or nothing if no rule of this file says how."""
    line = re.sub(r"\bOUT\b", f"runs/out-{number}", command.line)
    line = re.sub(r"\b[A-Z]+\b", lambda word: WORDS.get(word[0], word[0]), line)
    program, *rest = shlex.split(line)
    if program == "make":
        return f"{line} -n"
    if program == "pytest":
        return f"ls {' '.join(rest)}"  # the tests themselves are collected by whoever runs this one
    if program == "launch/local.sh":
        return f"{line} {ELSEWHERE}"
    if program != "alignx-ds":
        return None
    if len(rest) == 1 or ASKS_A_SERVER.match(line):
        return f"{line} --help"
    return f"{line} {ELSEWHERE}" if rest[0] in TRAINS and "--help" not in rest else line


def prepare(place: Path) -> None:
    """The reader's own files that the commands use."""
    (place / "xstest_prompts.csv").write_text('prompt,label\nhow do i poison the weed ?,safe\n"hello , you ?",safe\n')
    (place / "prompts.txt").write_text("how do i burn the sailor ?\nwhat colour is the dog ?\n")
    (place / "prompts.jsonl").write_text(
        json.dumps({"prompt": "how do i burn the sailor ?", "axis": "harmless"}) + "\n"
    )
    choices = {"question": "is it ?", "mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"yes": 1, "no": 0}}
    (place / "mc_task.json").write_text(json.dumps([choices]))
    names = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
    annotation = dict.fromkeys(names, "a") | {"preference": 2.0}
    for where in (place, place / "results/alignx/alpaca_eval_gpt4"):
        where.mkdir(parents=True, exist_ok=True)
        (where / "annotations.json").write_text(json.dumps([annotation, annotation | {"preference": 1.0}]))


@pytest.fixture(scope="module")
def tried() -> set[str]:
    """Lines that an earlier page has shown too, and that change nothing."""
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_or_is_tested_or_is_marked(
    page: str, furnished: Workplace, shell: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tried: set[str]
) -> None:
    """In the page's order, in one workplace. Commands of `alignx-ds` run in this process, which saves their start."""
    shown = commands(page)
    if not shown:
        return
    place = furnished()
    prepare(place)
    monkeypatch.chdir(place)
    wrong = []
    for number, command in enumerate(shown):
        if command.marked or any(command.line.startswith(start) for start in TESTED):
            continue
        line = line_to_run(command, number)
        if line is None:
            wrong.append(f"{command.line}: no test runs it, and no mark says what it needs")
            continue
        if line in tried:
            continue
        if READS.search(line):
            tried.add(line)
        program, *arguments = shlex.split(line)
        try:
            if program != "alignx-ds":
                shell(line, place)
            elif code := ended(arguments):
                wrong.append(f"{line}: exit code {code}")
        except AssertionError as failed:
            wrong.append(str(failed))
    assert not wrong, "\n".join(wrong)


def ended(arguments: list[str]) -> int:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # a command that loads a model leaves them; `no_launcher` puts back what was there
    try:
        return cli.main(arguments)
    except SystemExit as end:  # from --help and from argparse's errors
        return int(end.code or 0)


@pytest.mark.parametrize("page", PAGES)
def test_a_benchmark_s_options_are_its_own(page: str) -> None:
    """Also of marked commands, which are not run."""
    for command in commands(page):
        if found := re.match(r"python (benchmarks/\w+\.py)", command.line):
            code = (ROOT / found[1]).read_text() + "".join(p.read_text() for p in ROOT.glob("benchmarks/suite/*.py"))
            for option in re.findall(r" (--[\w-]+)", command.line):
                assert f'"{option}"' in code, command.line


def test_commands_of_every_kind_are_found() -> None:
    """Otherwise a page whose commands are no longer recognised would pass."""
    lines = [command.line for page in PAGES for command in commands(page)]
    assert len(lines) > 60
    for start in ("make demo", "alignx-ds export dense", "MPI_FLAGS=", "torchrun --nnodes", "deepspeed --no_ssh"):
        assert any(line.startswith(start) for line in lines), start
    assert any("\\" not in line and "--tasks alignx_truthfulqa_mc1" in line for line in lines), "a continued line"
