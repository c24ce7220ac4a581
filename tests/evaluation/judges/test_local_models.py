"""Loading a judge's model, its batches and cuts, and the probability of its next token."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_judges import POSITIONS, yes_or_no
from transformers import AutoModelForCausalLM

from alignx_ds.errors import ConfigError
from alignx_ds.evaluation.judges.models import batches, loaded

KEY = "judges.truth"
TEXTS = ["Q: a\nA: b\nTrue:", "Q: a much longer question\nA: lie it is\nTrue:", "True:"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    return yes_or_no(tmp_path_factory.mktemp("judge"), "lie", "True")


def test_batches_keep_all_items_in_order() -> None:
    assert [list(part) for part in batches(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []


def test_the_yes_probability_is_the_softmax_over_the_two(judge: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(judge)
    with loaded(judge, KEY, AutoModelForCausalLM) as model:
        yes, no = model.answer_tokens("True:", " yes", " no")
        assert model.tokenizer.convert_ids_to_tokens([yes, no]) == [" yes", " no"]
        texts = [model.encode(text) for text in TEXTS]
        found = list(model.yes_probabilities(texts, yes, no, batch=2))
    with torch.no_grad():
        logits = [plain(torch.tensor([ids])).logits[0, -1, [yes, no]] for ids in texts]
    assert found == pytest.approx([float(pair.softmax(0)[0]) for pair in logits], abs=1e-6)
    assert [p > 0.5 for p in found] == [True, False, True]


def test_cutting_takes_the_answers_end_and_then_the_prompts_beginning(judge: str) -> None:
    with loaded(judge, KEY, AutoModelForCausalLM) as model:
        assert model.limit == POSITIONS
        fits, cut = model.fit("A:{}\nTrue:".format, "lie")
        assert (fits, cut) == (model.encode("A:lie\nTrue:"), False)
        ids, cut = model.fit("A: {}\nTrue:".format, "lie" + " word" * POSITIONS, spare=10)
        assert cut
        assert POSITIONS - 30 < len(ids) <= POSITIONS - 10
        assert model.tokenizer.decode(ids).endswith("\nTrue:")
        assert model.encode(" lie")[-1] in ids
        ids, cut = model.fit((" word" * POSITIONS + "\nTrue:{}").format, "")
        assert cut and len(ids) == POSITIONS
        assert ids[-2:] == model.encode("True:")[-2:]


def test_the_weights_go_with_the_block(judge: str) -> None:
    with loaded(judge, KEY, AutoModelForCausalLM) as model:
        assert model.network.device.type != "meta" and not model.network.training
    assert {p.device.type for p in model.network.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["no/where", "not a name", ""])
def test_a_model_that_is_not_there_is_named_with_its_key(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{KEY}: got '{name}'"), loaded(name, KEY, AutoModelForCausalLM):
        pass


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=KEY), loaded(str(tmp_path), KEY, AutoModelForCausalLM):
        pass


def test_a_tokenizer_that_is_a_sentencepiece_model_names_the_package_it_needs(judge: str, tmp_path: Path) -> None:
    """Transformers itself would ask for tiktoken."""
    if find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    old = Path(shutil.copytree(judge, tmp_path / "old"))
    (old / "tokenizer.json").rename(old / "tokenizer.model")
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match="pip install sentencepiece"), loaded(str(old), KEY, AutoModelForCausalLM):
        pass
