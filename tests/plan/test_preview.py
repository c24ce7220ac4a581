"""`alignx-ds data preview`: the rows as training sees them, and what is not used; it writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.data.encode import encode
from alignx_ds.data.rows import Record, Row
from alignx_ds.plan.preview import Lengths

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]
Preview = Callable[..., str]
SYSTEM = "you are a helpful assistant ."
pytestmark = pytest.mark.usefixtures("no_launcher")


def hellos(count: int, **changes: str) -> list[Record]:
    numbers = "one two three four five six seven eight nine ten".split()
    return [
        {"instruction": f"hello {numbers[n % 10]} {numbers[n // 10]}", "input": "", "output": "i am well ."} | changes
        for n in range(count)
    ]


@pytest.fixture
def preview(
    write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], snapshot: Snapshot
) -> Preview:
    """Previews a recipe of one axis with these records, and checks that nothing is written."""

    def show(records: list[Record], *options: str) -> str:
        source = tmp_path / "rows.json"
        source.write_text(json.dumps(records), encoding="utf-8")
        recipe = write_recipe()
        values = OmegaConf.to_container(OmegaConf.load(recipe))
        assert isinstance(values, dict)
        values["axes"] = {"kind": {"prompt": SYSTEM, "schema": "alpaca", "train": str(source)}}
        del values["generalist"]
        OmegaConf.save(OmegaConf.create(values), recipe)
        before = snapshot(tmp_path)
        assert cli.main(["data", "preview", str(recipe), *options]) == 0
        assert snapshot(tmp_path) == before
        return capsys.readouterr().out

    return show


def test_rows_are_shown_with_what_is_masked_and_what_is_learned(
    preview: Preview, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    printed = preview(hellos(60), "--rows", "3")
    shown = [line for line in printed.splitlines() if line.endswith("learned")]
    assert len(shown) == 3
    assert all(line.startswith(f"{tmp_path / 'rows.json'}, row ") for line in shown)
    place = shown[0].split(":")[0]
    number = int(place.split()[-1]) - 1
    (example,) = encode([Row(hellos(60)[number]["instruction"], "i am well .")], world_tokenizer, SYSTEM)
    masked, learned = example.ids[: example.prompt_length], example.ids[example.prompt_length :]
    assert shown[0] == f"{place}: {len(masked)} tokens masked, {len(learned)} learned"
    assert world_tokenizer.decode(masked) + world_tokenizer.decode(learned) in printed
    assert SYSTEM in printed
    assert "chat template: chat_template.jinja of the model\nanswers end with: <eos>\n" in printed
    for part, ids in (("masked", masked), ("learned", learned)):
        assert f"{part} {' '.join(map(str, ids))}" in printed


def test_counts_and_reasons_are_shown(preview: Preview, tmp_path: Path) -> None:
    records = [*hellos(60), *hellos(3, output="<nooutput>"), *hellos(2, instruction=" "), *hellos(1, output="x " * 200)]
    printed = preview(records, "data.train_rows=1000")
    words = [line.split() for line in printed.splitlines()]
    trained, judged = (next(w for w in words if w[:2] == ["kind,", side]) for side in ("to", "held"))
    used = [int(line[line.index("of") - 1]) for line in (trained, judged)]
    dropped = [int(w[0]) for w in words if w and w[0].startswith("-")]
    assert sum(used) - sum(dropped) == len(records) == 66
    for reason in ("marked <nooutput>", "empty instruction", "longer than model.max_length=96 tokens"):
        assert reason in printed
    assert f"empty instruction, e.g. {tmp_path / 'rows.json'}, row 6" in printed


def test_lengths_are_shown(preview: Preview) -> None:
    printed = preview(hellos(60))
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    rows = {row[0]: [int(n.replace(",", "")) for n in row[1:]] for row in cells}
    prompt, answer, whole = (rows[f"kind, {part}"] for part in ("prompt", "answer", "row"))
    assert prompt[-1] + answer[-1] == whole[-1]
    assert answer[0] == answer[3] == 5  # i am well . <eos>
    assert whole[0] == prompt[0] + 5


@pytest.mark.parametrize("text", ["[bold]loud[/bold]", "[/dim]", ":smile:", "🙂\n\ttwo"])
def test_markup_in_rows_is_shown_as_it_is(preview: Preview, tmp_path: Path, text: str) -> None:
    """The tokenizer of a base model from scratch can write it; the world's has no words for it."""
    texts = ("scratch.texts.all.schema=alpaca", f"scratch.texts.all.source={tmp_path / 'rows.json'}")
    printed = preview(
        hellos(60, output=text), "model.path=scratch", "scratch.vocabulary=300", *texts, "model.layers=[]"
    )
    assert f"<|assistant|>{text.expandtabs()}<|end|>" in printed


def test_only_as_many_rows_are_shown_as_were_asked_for(preview: Preview) -> None:
    assert "tokens masked" not in preview(hellos(60), "--rows", "0")
    assert preview(hellos(60)).count("tokens masked") == 2


def test_lengths_of_one_row_are_its_own() -> None:
    assert Lengths.of([7]).cells() == ["7", "7", "7", "7", "7"]
    assert Lengths.of([*range(1, 102)]).cells() == ["1", "51", "96", "101", "5,151"]


def test_of_a_dialogue_every_answer_is_shown_as_learned(preview: Preview) -> None:
    records = [r | {"history": [["hello", "i am well ."]]} for r in hellos(60)]
    printed = preview(records, "--rows", "1")
    (shown,) = [line for line in printed.splitlines() if line.endswith("learned")]
    assert shown.endswith(" 10 learned")  # twice four words and the end
    assert "data.answers" not in printed
    assert preview(records, "data.answers=last", "--rows", "1").count(" 5 learned") == 1
