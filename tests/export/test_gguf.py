"""A dense export has what llama.cpp's converter reads; with `LLAMA_CPP`, a directory of its source, it is converted."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from alignx_ds import cli
from alignx_ds.config.schema import ModelConfig
from alignx_ds.models.base import WORLD_BASES, BaseModel
from alignx_ds.runs import manifest
from alignx_ds.stages import align

LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
PIECES, ADDED = 400, ("<|user|>", "<pad>")  # the second is the padding token
TEXT = "how do i Bake bread ? naïve 你 <|user|>"
PARTS = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{f"attn_{p}": f"self_attn.{p}_proj" for p in "qkv"} | {"attn_output": "self_attn.o_proj"},
    **{f"ffn_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """The world's base model with a tokenizer like LLaMA 2's: a SentencePiece model, and two tokens beside it."""
    from sentencepiece import SentencePieceTrainer

    path = tmp_path_factory.mktemp("base")
    options = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98, "minloglevel": 2}
    text = repo_root / "docs/export.md"
    SentencePieceTrainer.train(input=str(text), model_prefix=str(path / "tokenizer"), vocab_size=PIECES, **options)
    (path / "tokenizer.vocab").unlink()
    tokenizer = LlamaTokenizer.from_pretrained(path)
    tokenizer.add_tokens([ADDED[0]], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": ADDED[1]})
    tokenizer.chat_template = (WORLD_BASES["world"] / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(WORLD_BASES["world"] / name, path)
    return path


def exported(run: Path, base: Path, place: Path) -> Path:
    """A dense export of a copy of the run, as if it had been made with this base model's tokenizer."""
    shutil.copytree(run, place / "run")
    model = place / "run/model"
    content = manifest.read(model)
    aligned = AutoModelForCausalLM.from_pretrained(model)
    for old in model.iterdir():
        old.unlink()
    align.save(aligned, BaseModel(ModelConfig(path=str(base))), model)
    facts = {name: content[name] for name in content.keys() - {"fingerprint", "inputs", "files", "digest"}}
    manifest.write(model, content["inputs"], facts)
    (place / "prompts.txt").write_text("how do i bake bread ?\n")
    measured = ("--prompts", str(place / "prompts.txt"), "--max-new-tokens", "2")
    assert cli.main(["export", "dense", str(place / "run"), str(place / "out"), "--axes", "honest", *measured]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def dense(finished_run: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(finished_run, base, tmp_path_factory.mktemp("dense"))


def test_the_pieces_and_the_added_tokens_are_the_whole_vocabulary(dense: Path, base: Path) -> None:
    """The converter reads these two files; a token that is in neither gets a name without a meaning."""
    from sentencepiece import SentencePieceProcessor

    assert (dense / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    pieces = SentencePieceProcessor(model_file=str(dense / "tokenizer.model"))
    found = {pieces.IdToPiece(number): number for number in range(pieces.vocab_size())}
    added = json.loads((dense / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    found |= {token["content"]: int(number) for number, token in added.items()}
    assert all(added[str(PIECES + n)]["special"] for n in range(len(ADDED)))
    ours = AutoTokenizer.from_pretrained(dense)
    assert found == ours.get_vocab() and found.keys() >= set(ADDED)
    assert ours(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]


def test_an_export_of_the_mixture_keeps_the_pieces_too(dense: Path, base: Path, tmp_path: Path) -> None:
    assert cli.main(["export", "hf", str(dense.parent / "run"), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_without_the_pieces_it_says_what_is_missing(
    finished_run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other, ignore=shutil.ignore_patterns("tokenizer.model"))
    out = exported(finished_run, other, tmp_path)
    assert not (out / "tokenizer.model").exists()
    assert "before a conversion to GGUF, put the base model's into the export" in capsys.readouterr().err


@pytest.mark.skipif(not LLAMA_CPP, reason="needs the source of llama.cpp in LLAMA_CPP")
def test_the_converted_model_has_every_tensor_and_token(dense: Path, tmp_path: Path) -> None:
    file, sources = tmp_path / "model.gguf", Path(LLAMA_CPP)
    command = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(dense), "--outtype", "f32"]
    subprocess.run([*command, "--outfile", str(file)], check=True)
    sys.path.append(str(sources / "gguf-py"))
    read: Any = importlib.import_module("gguf").GGUFReader(file)
    config, own = json.loads((dense / "config.json").read_text()), load_file(dense / "model.safetensors")
    found = {named(t.name): torch.from_numpy(np.array(t.data)) for t in read.tensors}
    assert found.keys() == own.keys()
    for name, weight in own.items():
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        assert torch.equal(found[name], halves(weight, heads) if "q_proj" in name or "k_proj" in name else weight), name
    fields = {name: field.contents() for name, field in read.fields.items() if name.startswith("tokenizer.")}
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert all(fields["tokenizer.ggml.tokens"][n] == token for token, n in tokenizer.get_vocab().items())
    assert len(set(fields["tokenizer.ggml.scores"][:PIECES])) > PIECES / 3  # by which words are split
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def named(tensor: str) -> str:
    """The name in transformers of a tensor of llama.cpp."""
    *block, part, kind = tensor.split(".")
    return f"model.layers.{block[1]}.{PARTS[part]}.{kind}" if block else f"{ENDS[part]}.{kind}"


def halves(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection as llama.cpp rotates them: in pairs, where transformers has two halves."""
    pairs = weight.view(heads, 2, weight.shape[0] // heads // 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)
