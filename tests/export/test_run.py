"""`alignx-ds export …` on a finished run: all of it loads where it should, and says how far it is from the mixture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
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


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs the verb, which must succeed; returns what it printed, on one line."""

    def run(*arguments: str | Path) -> str:
        code = cli.main(["export", *map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
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
def aligned_model(run_dir: Path) -> AlignXForCausalLM:
    return AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, run_dir: Path, expert: int | None = None) -> Tensor:
    """Of the run's own prompts, all axes in one batch."""
    prompts = [
        json.loads(line)["prompt"]
        for axis in AXES
        for line in (run_dir / f"answers/alignx.{axis}.jsonl").read_text().splitlines()[:3]
    ]
    ids, mask = pad(encode_prompts(prompts, AutoTokenizer.from_pretrained(run_dir / "model")), 0, "left")
    forced = {} if expert is None else {"forced": torch.eye(4)[[expert] * len(ids)]}
    found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **forced).logits
    return found[mask.bool()]


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def figures(printed: str) -> list[tuple[float, float]]:
    """(relative error, token agreement) of every comparison that was printed."""
    found = re.findall(r"relative logits error (\S+), token agreement (\S+) \(", printed)
    return [(float(e), float(a)) for e, a in found]


def test_a_checkpoint_with_its_card(
    export: Export, run_dir: Path, tmp_path: Path, aligned_model: AlignXForCausalLM
) -> None:
    export("hf", run_dir, tmp_path / "out", "--max-shard-size", "500KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, run_dir), logits(aligned_model, run_dir))
    assert loaded.generation_config.eos_token_id == aligned_model.generation_config.eos_token_id is not None
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and set(AXES) < set(card.data.tags)
    assert card.data.license is None
    assert "# license: yours" in (tmp_path / "out/README.md").read_text()
    report = json.loads((run_dir / "report.json").read_text())
    for name, scores in report["systems"].items():
        cells = [f"{scores[c]:.1f}" for c in (*AXES, "avg", "benign_served")]
        assert f"| {name} | {' | '.join(cells)} |" in card.text
    assert f"accuracy {report['router']['accuracy']:.3f}" in card.text


def test_what_a_card_says_of_loading_is_true(export: Export, run_dir: Path, tmp_path: Path, repo_root: Path) -> None:
    """Its own lines of Python, word for word, in a process of their own."""
    export("hf", run_dir, tmp_path / "out")
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
    export: Export, run_dir: Path, tmp_path: Path, world_base: BaseModel, aligned_model: AlignXForCausalLM
) -> None:
    printed = export("adapters", run_dir, tmp_path / "out")
    for number, axis in enumerate(AXES, start=1):
        base = AutoModelForCausalLM.from_pretrained(world_base.path)
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / axis).eval()
        with without_calibration(aligned_model):
            assert error(logits(adapted, run_dir), logits(aligned_model, run_dir, expert=number)) < 1e-5
    found = figures(printed)
    assert len(found) == 6
    for (without, same), (with_calibration, _) in zip(found[::2], found[1::2], strict=True):
        assert without < 1e-5 < with_calibration < 1
        assert same == 1
    card = (tmp_path / "out/helpful/README.md").read_text()
    assert "with output calibration | 36 |" in card and "--max-lora-rank 8" in card


def test_a_dense_model_needs_nothing_of_ours(
    export: Export, run_dir: Path, tmp_path: Path, aligned_model: AlignXForCausalLM
) -> None:
    printed = export("dense", run_dir, tmp_path / "out", "--axis", "honest")
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
        assert error(logits(dense, run_dir), logits(aligned_model, run_dir, expert=3)) < 1e-5
    assert dense.generation_config.eos_token_id == aligned_model.generation_config.eos_token_id
    by_axis = dict(zip(AXES, figures(printed), strict=True))
    assert by_axis["honest"][0] < by_axis["harmless"][0]
    for axis, (distance, agreement) in by_axis.items():
        assert f"| {axis} | 12 | {distance:.2e} | {agreement:.4f} |" in (tmp_path / "out/README.md").read_text()


def test_weights_merge_the_experts(export: Export, run_dir: Path, tmp_path: Path, world_base: BaseModel) -> None:
    export("dense", run_dir, tmp_path / "out", "--weights", "helpful=0.5,honest=-0.25")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in LlamaForCausalLM.from_pretrained(world_base.path).state_dict().items():
        layer = next((i for i in (2, 3, 4) if f"layers.{i}.mlp" in name), None)
        expected = weight
        if layer is not None:
            p = next(p for p in ("gate", "up", "down") if f"{p}_proj" in name)
            for axis, share in (("helpful", 0.5), ("honest", -0.25)):
                expected = expected + share * read_factors(run_dir / "specialists" / axis, layer).delta(p)
        torch.testing.assert_close(dense[name], expected, rtol=1e-5, atol=1e-6)


def test_given_prompts_are_measured_on(export: Export, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello , how are you ?\n\ngood night .\n")
    printed = export("dense", run_dir, tmp_path / "out", "--axis", "honest", "--prompts", tmp_path / "prompts.txt")
    assert "on prompts of given" in printed and len(figures(printed)) == 1
    assert "| given | 2 |" in (tmp_path / "out/README.md").read_text()


def test_a_run_without_answers_says_that_nothing_was_measured(export: Export, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "model"):  # what `alignx-ds align` leaves
        (tmp_path / "run" / name).symlink_to(run_dir / name)
    assert "Not measured" in export("dense", tmp_path / "run", tmp_path / "dense", "--axis", "honest")
    assert "Not measured" in export("adapters", tmp_path / "run", tmp_path / "adapters")
    export("hf", tmp_path / "run", tmp_path / "hf")
    assert "Not evaluated" in (tmp_path / "hf/README.md").read_text()


def test_answers_as_alpaca_eval_reads_them(export: Export, run_dir: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out.json", tmp_path / "references.json"
    export("answers", run_dir, out, "--system", "helpful", "--set", "honest", "--own-references", own)
    lines = [json.loads(line) for line in (run_dir / "answers/helpful.honest.jsonl").read_text().splitlines()]
    written, references = json.loads(out.read_text()), json.loads(own.read_text())
    assert [(w["instruction"], w["output"]) for w in written] == [(line["prompt"], line["output"]) for line in lines]
    assert {w["generator"] for w in written} == {"helpful"}
    assert [r["output"] for r in references] == [line["row"]["response"] for line in lines]
    assert [r["instruction"] for r in references] == [w["instruction"] for w in written]


def test_answers_under_published_instructions(
    export: Export, refused: Callable[..., list[str]], run_dir: Path, tmp_path: Path
) -> None:
    lines = (run_dir / "answers/alignx.helpful.jsonl").read_text().splitlines()
    published = [
        {"dataset": "d", "instruction": f"{json.loads(line)['prompt']} ", "output": "o", "generator": "g"}
        for line in lines
    ]
    (tmp_path / "published.json").write_text(json.dumps(published))
    chosen = ("--set", "helpful", "--reference", tmp_path / "published.json")
    export("answers", run_dir, tmp_path / "out.json", *chosen)
    made = json.loads((tmp_path / "out.json").read_text())
    assert [(m["instruction"], m["dataset"]) for m in made] == [(p["instruction"], "d") for p in published]
    (line,) = refused("answers", run_dir, tmp_path / "out.json", *chosen)
    assert "a new .json file" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("dense", "RUN", "OUT", "--axis", "helpfl"), ["'helpfl'", "helpful, harmless, honest"]),
        (("dense", "RUN", "OUT", "--weights", "helpful=much"), ["helpful=much", "number"]),
        (("dense", "RUN", "OUT", "--weights", "helpful=1,helpful=2"), ["each axis once"]),
        (("dense", "RUN", "OUT", "--axis", "helpful", "--prompts", "RUN"), ["one prompt per line"]),
        (("hf", "NOWHERE", "OUT"), ["RUN_DIR", "alignx-ds align"]),
        (("hf", "RUN", "RUN"), ["OUT", "nothing was touched"]),
        (("hf", "RUN", "OUT", "--max-shard-size", "much"), ["--max-shard-size"]),
        (("answers", "RUN", "OUT.json", "--set", "nothing"), ["alignx.nothing", "alignx.helpful"]),
        (("adapters", "RUN/model", "OUT"), ["RUN_DIR"]),
        (("lm-eval", "RUN/model", "NOWHERE", "OUT"), ["NOWHERE"]),
    ],
)
def test_what_can_be_mended_is_said_in_a_line(
    refused: Callable[..., list[str]], run_dir: Path, tmp_path: Path, arguments: tuple[str, ...], named: list[str]
) -> None:
    places = {"RUN": str(run_dir), "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "NOWHERE")}
    filled = [re.sub("RUN|OUT|NOWHERE", lambda m: places[m.group()], a) for a in arguments]
    (line,) = refused(*filled)
    assert all(name in line for name in named)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_model_is_not_exported(refused: Callable[..., list[str]], run_dir: Path, tmp_path: Path) -> None:
    weights = run_dir / "model/model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1])
        (line,) = refused("hf", run_dir, tmp_path / "out")
    finally:
        weights.write_bytes(content)
    assert "differs from its manifest" in line


@pytest.mark.timeout(600)
def test_an_exported_adapter_is_an_expert_of_another_run(
    export: Export,
    run_dir: Path,
    tmp_path: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
    small: tuple[str, ...],
) -> None:
    """Of rank 4, beside experts of rank 2; the baselines train from rows as ever, and the report is written."""
    export("adapters", run_dir, tmp_path / "adapters")
    own = (f"axes.helpful.adapter={tmp_path / 'adapters/helpful'}", "experts.rank=2", f"output={tmp_path / 'run'}")
    done = command("run", "launch/recipes/world.yaml", *small, *own)
    assert done.returncode == 0, done.stderr
    facts = manifest.read(tmp_path / "run/specialists/helpful")
    assert facts["losses"] == [] and facts["adapter"].endswith("adapters/helpful")
    for layer in (2, 3, 4):
        given = read_factors(run_dir / "specialists/helpful", layer)
        taken = read_factors(tmp_path / "run/specialists/helpful", layer)
        vector = read_task_vector(tmp_path / "run/specialists/helpful", layer)
        for p in ("gate", "up", "down"):
            assert torch.equal(taken.down[p], given.down[p]) and torch.equal(taken.up[p], given.up[p])
            torch.testing.assert_close(vector[p], given.delta(p))
    assert list(json.loads((tmp_path / "run/report.json").read_text())["systems"]) == [
        *("base", *AXES, "sequential", "mixed", "alignx")
    ]
    export("adapters", tmp_path / "run", tmp_path / "again")
    ranks = {a: json.loads((tmp_path / f"again/{a}/adapter_config.json").read_text())["r"] for a in AXES}
    assert ranks == {"helpful": 4, "harmless": 2, "honest": 2}
    again = command("align", "launch/recipes/world.yaml", *small, *own)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("unchanged, reused from") == 4


def test_an_adapter_that_does_not_fit_is_refused_before_anything_starts(
    export: Export,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export("adapters", run_dir, tmp_path / "adapters")
    monkeypatch.chdir(repo_root)
    settings = (
        f"axes.helpful.adapter={tmp_path / 'adapters/helpful'}",
        "model.layers=[3]",
        *("launch.ranks=1", "align.ep_size=1"),
        f"output={tmp_path / 'run'}",
    )
    assert cli.main(["run", "launch/recipes/world.yaml", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "axes.helpful.adapter" in line and "set model.layers=[2, 3, 4]" in line
    assert not (tmp_path / "run").exists()
