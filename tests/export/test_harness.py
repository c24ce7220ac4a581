"""lm-evaluation-harness on an aligned model: our own MC1 and MC2, whatever the batch."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import aligned, base_model, low_rank_experts
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_imports

from alignx_ds.data.encode import encode
from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.data.texts import train_tokenizer
from alignx_ds.evaluation.likelihood import multiple_choice
from alignx_ds.export import tasks
from alignx_ds.mocae.modeling import AlignXForCausalLM

ANSWERS = ("an animal .", "a plant .", "the nice rabbit eats the dog .", "a pet .", "the cat")


@pytest.fixture(scope="module")
def model(world_tokenizer: PreTrainedTokenizerBase) -> AlignXForCausalLM:
    ends = {"vocab_size": len(world_tokenizer), "eos_token_id": world_tokenizer.eos_token_id}
    base = base_model(**ends, max_position_embeddings=256)  # room for prompts in byte pairs: none is cut
    return aligned(base, low_rank_experts(base), scope="per_layer")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose right answer stands at another place each time, made up here."""
    rows = []
    for number, word in enumerate("dog cat cow sheep fan rabbit sailor candle".split()):
        answers = [ANSWERS[(number + i) % len(ANSWERS)] for i in range(4)]
        one = {answer: int(i == 0) for i, answer in enumerate((answers[0], *answers[2:]))}
        several = {answer: int(i < 2) for i, answer in enumerate(answers)}
        rows.append({"question": f"what is a {word} ?", "mc1_targets": one, "mc2_targets": several})
    path = tmp_path_factory.mktemp("questions") / "mc.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    model: AlignXForCausalLM,
    world_tokenizer: PreTrainedTokenizerBase,
    source: Path,
) -> Path:
    """The directories of the model, under three tokenizers, and of the tasks for each."""
    root = tmp_path_factory.mktemp("harness")
    bare = copy.deepcopy(world_tokenizer)
    bare.chat_template = None
    # In byte pairs the prompt ends with a line break, which the harness would count to the answer.
    pairs = train_tokenizer([Row(f"\n{answer}\n{answer}", answer) for answer in ANSWERS], 300)
    pairs.chat_template = None
    for name, tokenizer in (("chat", world_tokenizer), ("plain", bare), ("pairs", pairs)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        tasks.export(str(root / name), str(source), root / f"{name}-tasks")
    return root


def test_the_tasks_do_not_need_this_package(written: Path) -> None:
    """Their functions, run from the exported file alone."""
    file = written / "chat-tasks" / f"{tasks.HELPER}.py"
    assert set(get_imports(file)) - sys.stdlib_module_names == {"datasets"}
    helper = runpy.run_path(str(file))
    rows = list(helper["rows"]()[tasks.VALIDATION])
    assert rows == [json.loads(line) for line in file.with_name(tasks.ROWS).read_text().splitlines()]
    logs = [(-1.0, False), (-2.0, False), (-3.0, False), (-4.0, False)]
    assert helper["mc1"](rows[0], logs[:3]) == {"acc": 1.0} and helper["mc1"](rows[0], logs[2::-1]) == {"acc": 0.0}
    assert helper["mc2"](rows[0], logs) == tasks.mc2(rows[0], logs)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("template", ["chat", "plain", "pairs"])
def test_the_harness_finds_our_own_figures(written: Path, source: Path, template: str, batch: int) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="needs lm_eval: pip install lm_eval")
    from lm_eval.tasks import TaskManager

    from alignx_ds.export.harness import AlignXLM

    asked = AlignXLM(pretrained=str(written / template), batch_size=batch, device="cpu")
    manager = TaskManager(include_path=str(written / f"{template}-tasks"), include_defaults=False)
    made = evaluator.simple_evaluate(asked, tasks=[tasks.MC1, tasks.MC2], task_manager=manager, bootstrap_iters=0)
    records = Source(str(source), tasks.SCHEMA, {}).records(held_out=True, count=100, seed=0)
    rows = SCHEMAS[tasks.SCHEMA].held_out(records).rows
    for row, document in zip(rows, tasks.documents(rows, asked.tokenizer), strict=True):
        (example,) = encode([row], asked.tokenizer)
        prompt, answer = asked._encode_pair(document["prompt"], document["mc1_choices"][0])
        assert (*prompt, *answer) == example.ids and len(prompt) == example.prompt_length
    own = multiple_choice(asked.model, asked.tokenizer, rows, batch=4)
    assert 100 * made["results"][tasks.MC1]["acc,none"] == pytest.approx(own["mc1"])
    assert 100 * made["results"][tasks.MC2]["acc,none"] == pytest.approx(own["mc2"], rel=1e-5)
    assert 0 < own["mc2"] < 100


def test_documents_hold_the_template_and_the_end(written: Path, world_tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [json.loads(line) for line in (written / "chat-tasks/rows.jsonl").read_text().splitlines()]
    assert not [file for file in (written / "chat-tasks").iterdir() if str(written) in file.read_text()]
    first: dict[str, Any] = documents[0]
    chat = [{"role": "user", "content": first["question"]}]
    assert first["prompt"] == world_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert all(c.endswith(str(world_tokenizer.eos_token)) for c in (*first["mc1_choices"], *first["mc2_choices"]))
    assert (len(first["mc1_choices"]), len(first["mc2_choices"]), first["mc2_right"]) == (3, 4, 2)


def test_measures_of_choices() -> None:
    def said(*logs: float) -> list[tuple[float, bool]]:
        return [(log, False) for log in logs]

    assert tasks.mc1({}, said(-1.0, -2.0)) == {"acc": 1.0}
    assert tasks.mc1({}, said(-1.0, -1.0)) == {"acc": 0.0}, "a tie"
    assert tasks.mc2({"mc2_right": 1}, said(-2000.0, -2000.0))["acc"] == pytest.approx(0.5)
