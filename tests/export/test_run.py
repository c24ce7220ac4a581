"""`alignx-ds export …` on a finished run: what it writes can be loaded, and its distance to the model is measured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from processes import in_this_process
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from alignx_ds import cli
from alignx_ds.data.batches import pad
from alignx_ds.data.encode import encode_prompts
from alignx_ds.experts.task_vectors import read_factors, read_task_vector
from alignx_ds.export.fidelity import without_calibration
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest

AXES = ("helpful", "harmless", "honest")
pytestmark = pytest.mark.usefixtures("no_launcher")
Export = Callable[..., str]


TEXTS = {".json", ".jsonl", ".md", ".yaml", ".py", ".txt", ".jinja"}


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str], repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Runs the verb, which has to succeed and to write no path of this machine; returns its output on one line."""
    places = (str(repo_root), str(tmp_path_factory.getbasetemp()), str(Path.home()))

    def run(*arguments: str | Path) -> str:
        code = cli.main(["export", *map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        for file in Path(arguments[2]).rglob("*"):
            text = file.read_text(encoding="utf-8") if file.suffix in TEXTS else ""
            assert not [place for place in places if place in text], file
        return " ".join(printed.out.split())

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    def run(*arguments: str | Path) -> list[str]:
        assert cli.main(["export", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err.splitlines()

    return run


@pytest.fixture(scope="module")
def aligned_model(finished_run: Path) -> AlignXForCausalLM:
    return AutoModelForCausalLM.from_pretrained(finished_run / "model").eval()


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, finished_run: Path, expert: int | None = None) -> Tensor:
    """Of the run's own prompts, all axes in one batch."""
    prompts = [
        json.loads(line)["prompt"]
        for axis in AXES
        for line in (finished_run / f"answers/alignx.{axis}.jsonl").read_text().splitlines()[:3]
    ]
    ids, mask = pad(encode_prompts(prompts, AutoTokenizer.from_pretrained(finished_run / "model")), 0, "left")
    forced = {} if expert is None else {"forced": torch.eye(4)[[expert] * len(ids)]}
    found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **forced).logits
    return found[mask.bool()]


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def comparisons(printed: str) -> list[tuple[float, float]]:
    """(relative error, token agreement) of every comparison that was printed."""
    found = re.findall(r"relative logits error (\S+), token agreement (\S+) \(", printed)
    return [(float(e), float(a)) for e, a in found]


def test_a_checkpoint_with_its_card(
    export: Export, finished_run: Path, tmp_path: Path, aligned_model: AlignXForCausalLM
) -> None:
    export("hf", finished_run, tmp_path / "out", "--max-shard-size", "500KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, finished_run), logits(aligned_model, finished_run))
    assert loaded.generation_config.eos_token_id == aligned_model.generation_config.eos_token_id is not None
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and set(AXES) < set(card.data.tags)
    assert card.data.license is None
    assert "# license: yours" in (tmp_path / "out/README.md").read_text()
    report = json.loads((finished_run / "report.json").read_text())
    for name, scores in report["systems"].items():
        cells = [f"{scores[c]:.1f}" for c in (*AXES, "avg", "benign_served")]
        assert f"| {name} | {' | '.join(cells)} |" in card.text
    assert f"accuracy {report['router']['accuracy']:.3f}" in card.text


def test_a_card_s_example_can_be_run(export: Export, finished_run: Path, tmp_path: Path, repo_root: Path) -> None:
    export("hf", finished_run, tmp_path / "out")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    program = program.replace("max_new_tokens=256", "max_new_tokens=3")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(repo_root)!r})\n{program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_adapters_are_the_forced_experts(
    export: Export, finished_run: Path, tmp_path: Path, world_base: BaseModel, aligned_model: AlignXForCausalLM
) -> None:
    printed = export("adapters", finished_run, tmp_path / "out")
    for number, axis in enumerate(AXES, start=1):
        base = AutoModelForCausalLM.from_pretrained(world_base.path)
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / axis).eval()
        with without_calibration(aligned_model):
            assert error(logits(adapted, finished_run), logits(aligned_model, finished_run, expert=number)) < 1e-5
    found = comparisons(printed)
    assert len(found) == 6
    for (without, same), (with_calibration, _) in zip(found[::2], found[1::2], strict=True):
        assert without < 1e-5 < with_calibration < 1
        assert same == 1
    card = (tmp_path / "out/helpful/README.md").read_text()
    assert "with output calibration | 48 |" in card and "--max-lora-rank 8" in card


def test_one_adapter_of_several_experts(
    export: Export, finished_run: Path, tmp_path: Path, world_base: BaseModel
) -> None:
    printed = export("adapters", finished_run, tmp_path / "out", "--axes", "helpful,honest")
    (without, same), (with_calibration, _) = comparisons(printed)
    assert without < 1e-5 < with_calibration and same == 1
    export("dense", finished_run, tmp_path / "dense", "--axes", "helpful,honest")
    base = AutoModelForCausalLM.from_pretrained(world_base.path)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert error(logits(adapted, finished_run), logits(dense, finished_run)) < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "# 0.5 · helpful + 0.5 · honest as a LoRA adapter" in card
        and "--max-lora-rank 8" in card
        and "--lora-modules out=" in card
    )


def test_a_dense_model_loads_without_this_package(
    export: Export, finished_run: Path, tmp_path: Path, aligned_model: AlignXForCausalLM
) -> None:
    printed = export("dense", finished_run, tmp_path / "out", "--axis", "honest")
    program = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
print(type(model).__name__, any(name.startswith("alignx") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LlamaForCausalLM", "False"], done.stderr
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with without_calibration(aligned_model):
        assert error(logits(dense, finished_run), logits(aligned_model, finished_run, expert=3)) < 1e-5
    assert dense.generation_config.eos_token_id == aligned_model.generation_config.eos_token_id
    by_axis = dict(zip(AXES, comparisons(printed), strict=True))
    assert by_axis["honest"][0] < by_axis["harmless"][0]
    for axis, (distance, agreement) in by_axis.items():
        assert f"| {axis} | 16 | {distance:.2e} | {agreement:.4f} |" in (tmp_path / "out/README.md").read_text()


def test_weights_merge_the_experts(export: Export, finished_run: Path, tmp_path: Path, world_base: BaseModel) -> None:
    export("dense", finished_run, tmp_path / "out", "--weights", "helpful=0.5,honest=-0.25")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in LlamaForCausalLM.from_pretrained(world_base.path).state_dict().items():
        layer = next((i for i in (3, 4) if f"layers.{i}.mlp" in name), None)
        expected = weight
        if layer is not None:
            p = next(p for p in ("gate", "up", "down") if f"{p}_proj" in name)
            for axis, share in (("helpful", 0.5), ("honest", -0.25)):
                expected = expected + share * read_factors(finished_run / "specialists" / axis, layer).delta(p)
        torch.testing.assert_close(dense[name], expected, rtol=1e-5, atol=1e-6)


def test_given_prompts_are_measured_on(export: Export, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello , how are you ?\n\ngood night .\n")
    printed = export("dense", finished_run, tmp_path / "out", "--axis", "honest", "--prompts", tmp_path / "prompts.txt")
    assert "on prompts of given" in printed and len(comparisons(printed)) == 1
    assert "| given | 2 |" in (tmp_path / "out/README.md").read_text()


def test_without_answers_nothing_is_measured(export: Export, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "model"):  # what `alignx-ds align` leaves
        (tmp_path / "run" / name).symlink_to(finished_run / name)
    assert "Not measured" in export("dense", tmp_path / "run", tmp_path / "dense", "--axis", "honest")
    assert "Not measured" in export("adapters", tmp_path / "run", tmp_path / "adapters")
    export("hf", tmp_path / "run", tmp_path / "hf")
    assert "Not evaluated" in (tmp_path / "hf/README.md").read_text()


def test_answers_as_alpaca_eval_reads_them(export: Export, finished_run: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out.json", tmp_path / "references.json"
    export("answers", finished_run, out, "--system", "helpful", "--set", "honest", "--own-references", own)
    lines = [json.loads(line) for line in (finished_run / "answers/helpful.honest.jsonl").read_text().splitlines()]
    written, references = json.loads(out.read_text()), json.loads(own.read_text())
    assert [(w["instruction"], w["output"]) for w in written] == [(line["prompt"], line["output"]) for line in lines]
    assert {w["generator"] for w in written} == {"helpful"}
    assert [r["output"] for r in references] == [line["row"]["response"] for line in lines]
    assert [r["instruction"] for r in references] == [w["instruction"] for w in written]


def test_answers_under_published_instructions(
    export: Export, refused: Callable[..., list[str]], finished_run: Path, tmp_path: Path
) -> None:
    lines = (finished_run / "answers/alignx.helpful.jsonl").read_text().splitlines()
    published = [
        {"dataset": "d", "instruction": f"{json.loads(line)['prompt']} ", "output": "o", "generator": "g"}
        for line in lines
    ]
    (tmp_path / "published.json").write_text(json.dumps(published))
    chosen = ("--set", "helpful", "--reference", tmp_path / "published.json")
    export("answers", finished_run, tmp_path / "out.json", *chosen)
    made = json.loads((tmp_path / "out.json").read_text())
    assert [(m["instruction"], m["dataset"]) for m in made] == [(p["instruction"], "d") for p in published]
    (line,) = refused("answers", finished_run, tmp_path / "out.json", *chosen)
    assert "a new .json file" in line


def test_answers_that_another_recipe_has_left_are_not_the_run_s(
    refused: Callable[..., list[str]], finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run / "answers", tmp_path / "run/answers")
    shutil.copy(finished_run / "config.yaml", tmp_path / "run")
    (tmp_path / "run/answers/alignx.helpful.jsonl").rename(tmp_path / "run/answers/dare.helpful.jsonl")
    (line,) = refused("answers", tmp_path / "run", tmp_path / "out.json", "--system", "dare", "--set", "helpful")
    assert "base.helpful" in line and "dare.helpful," not in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("dense", "RUN", "OUT", "--axis", "helpfl"), ["'helpfl'", "helpful, harmless, honest"]),
        (("dense", "RUN", "OUT", "--weights", "helpful=much"), ["helpful=much", "number"]),
        (("adapters", "RUN", "OUT", "--axes", "helpful,,honest"), ["''", "helpful, harmless, honest"]),
        (("dense", "RUN", "OUT", "--weights", "helpful=1,helpful=2"), ["each axis once"]),
        (("dense", "RUN", "OUT", "--axis", "helpful", "--prompts", "RUN"), ["one prompt per line"]),
        (("hf", "NOWHERE", "OUT"), ["RUN_DIR", "no such directory"]),
        (("hf", "RUN", "RUN"), ["OUT", "nothing was touched"]),
        (("hf", "RUN", "OUT", "--max-shard-size", "much"), ["--max-shard-size"]),
        (("answers", "RUN", "OUT.json", "--set", "nothing"), ["alignx.nothing", "alignx.helpful"]),
        (("adapters", "RUN/model", "OUT"), ["RUN_DIR"]),
        (("lm-eval", "RUN/model", "NOWHERE", "OUT"), ["NOWHERE"]),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    refused: Callable[..., list[str]], finished_run: Path, tmp_path: Path, arguments: tuple[str, ...], named: list[str]
) -> None:
    places = {"RUN": str(finished_run), "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "NOWHERE")}
    filled = [re.sub("RUN|OUT|NOWHERE", lambda m: places[m.group()], a) for a in arguments]
    (line,) = refused(*filled)
    assert all(name in line for name in named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(600)
def test_an_exported_adapter_is_an_expert_of_another_run(
    export: Export,
    finished_run: Path,
    tmp_path: Path,
    small_run: tuple[str, ...],
) -> None:
    """Of rank 4, beside experts of rank 2. The baselines are trained on the axis's rows all the same."""
    export("adapters", finished_run, tmp_path / "adapters")
    own = (f"axes.helpful.adapter={tmp_path / 'adapters/helpful'}", "experts.rank=2", f"output={tmp_path / 'run'}")
    aligned = in_this_process("align", "launch/recipes/world.yaml", *small_run, *own)
    assert aligned.returncode == 0, aligned.stderr
    facts = manifest.read(tmp_path / "run/specialists/helpful")
    assert facts["losses"] == [] and facts["adapter"].endswith("adapters/helpful")
    for layer in (3, 4):
        given = read_factors(finished_run / "specialists/helpful", layer)
        taken = read_factors(tmp_path / "run/specialists/helpful", layer)
        vector = read_task_vector(tmp_path / "run/specialists/helpful", layer)
        for p in ("gate", "up", "down"):
            assert torch.equal(taken.down[p], given.down[p]) and torch.equal(taken.up[p], given.up[p])
            torch.testing.assert_close(vector[p], given.delta(p))
    export("adapters", tmp_path / "run", tmp_path / "again")
    ranks = {a: json.loads((tmp_path / f"again/{a}/adapter_config.json").read_text())["r"] for a in AXES}
    assert ranks == {"helpful": 4, "harmless": 2, "honest": 2}
    done = in_this_process("run", "launch/recipes/world.yaml", *small_run, *own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged, reused from") == 4, "three specialists and the model"
    assert list(json.loads((tmp_path / "run/report.json").read_text())["systems"]) == [
        *("base", *AXES, "sequential", "mixed", "alignx")
    ]


def test_an_adapter_that_does_not_fit_is_refused_before_anything_starts(
    export: Export,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export("adapters", finished_run, tmp_path / "adapters")
    monkeypatch.chdir(repo_root)
    settings = (
        f"axes.helpful.adapter={tmp_path / 'adapters/helpful'}",
        "model.layers=[3]",
        *("launch.ranks=1", "align.ep_size=1"),
        f"output={tmp_path / 'run'}",
    )
    assert cli.main(["run", "launch/recipes/world.yaml", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "axes.helpful.adapter" in line and "set model.layers=[3, 4]" in line
    assert not (tmp_path / "run").exists()
