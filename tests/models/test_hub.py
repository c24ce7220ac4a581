"""A hub repository: the files that transformers reads are fetched, and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignx_ds import cli
from alignx_ds.config.schema import ModelConfig
from alignx_ds.experts.adapters import CONFIG, WEIGHTS, Adapter
from alignx_ds.models.base import WORLD_BASES, BaseModel, local_model

WriteRecipe = Callable[..., Path]
NEVER = (
    *("consolidated.safetensors", "consolidated.00.pth", "original/params.json", "original/tokenizer.model"),
    *("onnx/config.json", "onnx/model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "model.fp16.safetensors", "README.md", "params.json", "training_args.json"),
    *("tokenizer.model", "vocab.json", "gguf/model.gguf", "modeling_own.py", "extra/chat_template.jinja"),
)


class Repository:
    """A stand-in for the hub: one repository on the disk, of which `snapshot_download` copies what is asked for."""

    def __init__(self, root: Path) -> None:
        self.files, self.snapshot = root / "repository", root / "snapshot"
        shutil.copytree(WORLD_BASES["world"], self.files)

    def add(self, *names: str, content: str = "{}") -> None:
        for name in names:
            (self.files / name).parent.mkdir(parents=True, exist_ok=True)
            (self.files / name).write_text(content)

    def download(self, repo_id: str, *, allow_patterns: Any = None, ignore_patterns: Any = None, **_: Any) -> str:
        names = [str(p.relative_to(self.files)) for p in self.files.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.files / name, self.snapshot / name)
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {str(p.relative_to(self.snapshot)) for p in self.snapshot.rglob("*") if p.is_file()}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


def test_what_transformers_reads_is_fetched_and_nothing_else(repository: Repository) -> None:
    repository.add(*NEVER)
    repository.add("additional_chat_templates/rag.jinja", content="{{ messages }}")
    config = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    config.add("additional_chat_templates/rag.jinja")
    base = BaseModel(ModelConfig(path="owner/name"), weights=False)
    assert repository.fetched == config
    assert base.tokenizer.chat_template["default"] == (WORLD_BASES["world"] / "chat_template.jinja").read_text()
    assert BaseModel(ModelConfig(path="owner/name")).has_weights
    assert repository.fetched == {*config, "model.safetensors"}


def test_shards_are_those_of_the_index(repository: Repository) -> None:
    (repository.files / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(WORLD_BASES["world"])
    model.save_pretrained(repository.files, max_shard_size="2MB")
    shards = {p.name for p in repository.files.glob("model-*")}
    repository.add("model-00009-of-00009.safetensors", *NEVER)
    base = BaseModel(ModelConfig(path="owner/name"))
    assert {name for name in repository.fetched if name.endswith(".safetensors")} == shards
    assert len(shards) > 1
    assert base.weight(4, "down").shape == (128, 256)


def test_without_a_tokenizer_json_its_sources_are_fetched(repository: Repository) -> None:
    (repository.files / "tokenizer.json").unlink()
    repository.add("tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt", "original/tokenizer.model")
    local_model("owner/name", weights=False)
    found = {"tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt"}
    assert {n for n in repository.fetched if n.startswith(("tokenizer.model", "vocab", "merges", "orig"))} == found


def test_of_an_adapter_its_two_files_are_fetched(repository: Repository) -> None:
    repository.add(CONFIG, content='{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, repository.files / WEIGHTS)
    assert Adapter("owner/adapter", "axes.x.adapter").config["peft_type"] == "LORA"
    assert repository.fetched == {CONFIG, WEIGHTS}


@pytest.mark.usefixtures("no_launcher")
def test_a_dry_run_names_the_template(
    repository: Repository, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template of most models of today is a file of its own; without any, the fallback is said."""
    arguments = ["run", str(write_recipe("model.path=owner/name")), "--dry-run"]
    assert cli.main(arguments) == 0
    assert "chat template               chat_template.jinja of the model\n" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(repository.snapshot).chat_template
    for place in (repository.files, repository.snapshot):
        (place / "chat_template.jinja").unlink()
    assert cli.main(arguments) == 0
    assert "chat template               none; prompts are written in the Alpaca format\n" in capsys.readouterr().out
