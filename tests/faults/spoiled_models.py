"""Ways to spoil a model directory: its weights, their headers and index, config, tokenizer, template, and whole files.

Each takes a source of random choices, changes a directory, and says what it has changed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
VALUES: list[Any] = [None, True, -1, 0, 1, 3, 10**9, 1.5, "", "x", "é\n\x1b[31m", [], [1], ["x"], {}, {"a": 1}]
Spoil = Callable[[random.Random, Path], str]  # changes a directory and says what it changed


# --- weights ------------------------------------------------------------------------------------------------------


def weights_of(directory: Path) -> Path:
    """A model's or an adapter's."""
    return next(directory.glob("*model.safetensors"))


def weights(chance: random.Random, directory: Path) -> str:
    """One tensor is gone, renamed, of another shape or type, or holds what is no number."""
    tensors = load_file(weights_of(directory))
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    changes: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "gone": lambda: {},
        "renamed": lambda: {
            chance.choice(("_orig_mod.", "module.", "x", "")) + name + chance.choice(("x", ".y")): value
        },
        "one more": lambda: {name: value, f"{name}_scale": torch.ones(1)},
        "empty": lambda: {name: torch.empty(0)},
        "flat": lambda: {name: value.flatten()},
        "turned": lambda: {name: value.mT.contiguous() if value.dim() == 2 else value[None]},
        "cut": lambda: {name: value.reshape(-1)[1:].clone()},
        "integers": lambda: {name: value.to(chance.choice((torch.int8, torch.uint8, torch.int64, torch.bool)))},
        "halves": lambda: {name: value.half()},
        "doubles": lambda: {name: value.double()},
        "8 bits": lambda: {name: value.to(torch.float8_e4m3fn)},
        "complex": lambda: {name: value.to(torch.complex64)},
        "nan": lambda: {name: torch.full_like(value, float("nan"))},
        "inf": lambda: {name: torch.full_like(value, float("-inf"))},
        "zero": lambda: {name: torch.zeros_like(value)},
    }
    what = chance.choice(sorted(changes))
    del tensors[name]
    save_file(tensors | changes[what](), weights_of(directory), metadata={"format": "pt"})
    return f"{name}: {what}"


def header(chance: random.Random, directory: Path) -> str:
    """Bytes of the weights' file: cut off, overwritten in the header, added, or replaced by something else."""
    file = weights_of(directory)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    what = chance.choice(("cut", "byte", "length", "more", "other", "folder", "number"))
    if what == "cut":
        del content[chance.choice((0, 1, 7, 8, 9, length // 2, length + 8, len(content) - 1)) :]
    elif what == "byte":
        for _ in range(chance.choice((1, 3))):
            content[8 + chance.randrange(length)] = chance.randrange(256)
    elif what == "length":
        content[:8] = chance.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1)).to_bytes(8, "little")
    elif what == "number":
        text = content[8 : 8 + length].decode()
        place = chance.choice([i for i, c in enumerate(text) if c.isdigit()])
        content[8 + place] = ord(chance.choice("0123456789"))
    elif what == "more":
        content += b"more"
    elif what == "other":
        content = bytearray(
            chance.choice((b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"version https://git-lfs.github.com/spec/v1\n"))
        )
    file.unlink()
    if what == "folder":
        file.mkdir()
    else:
        file.write_bytes(content)
    return what


def shards(chance: random.Random, directory: Path) -> str:
    """Several files and their index, of which one is gone or says something else."""
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="40KB")
    (directory / WEIGHTS).unlink(missing_ok=True)
    files, index = sorted(directory.glob("model-*.safetensors")), json.loads((directory / INDEX).read_text())
    names = sorted(index["weight_map"])
    what = chance.choice(("gone", "pointer", "swapped", "unnamed", "elsewhere", "value", "map", "file"))
    one, other = chance.sample(files, 2)
    if what == "gone":
        one.unlink()
    elif what == "pointer":
        one.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    elif what == "swapped":
        shutil.copy(one, other)
    elif what == "unnamed":
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != one.name}
    elif what == "elsewhere":
        index["weight_map"][chance.choice(names)] = chance.choice(
            ("", ".", "..", "/etc/hostname", "a/b", "x" * 300, "config.json", "a\0b")
        )
    elif what == "value":
        index["weight_map"][chance.choice(names)] = chance.choice(VALUES)
    elif what == "map":
        index["weight_map"] = chance.choice(VALUES)
    (directory / INDEX).write_text(json.dumps(index))
    if what == "file":
        (directory / INDEX).write_bytes(chance.choice((b"", b"{", b"[]", b"\xff", b"{}", b"null")))
    return what


# --- JSON files ---------------------------------------------------------------------------------------------------


def paths(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists and mappings the first few."""
    if above:
        yield above
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[:40]:
        yield from paths(value, (*above, key))


def spoil_json(chance: random.Random, file: Path) -> str:
    """One value is another, or gone; or the file is no JSON."""
    if chance.random() < 0.1:
        text = file.read_bytes()
        content = chance.choice(
            (b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", text[: len(text) // 2], b"\xef\xbb\xbf" + text,
             b"[" * 3000, b"{}", b"version https://git-lfs.github.com/spec/v1\n")
        )  # fmt: skip
        file.write_bytes(content)
        return f"{file.name} is {content[:20]!r}"
    whole = json.loads(file.read_text())
    places = list(paths(whole))
    place = chance.choice([p for p in places if len(p) == 1] if chance.random() < 0.6 else places)
    parent = whole
    for key in place[:-1]:
        parent = parent[key]
    before = parent[place[-1]]
    if chance.random() < 0.15:
        del parent[place[-1]]
    else:
        parent[place[-1]] = chance.choice([v for v in VALUES if v != before])
    file.write_text(json.dumps(whole))
    now = parent.get(place[-1], "gone") if isinstance(parent, dict) else parent
    return f"{file.name}: {'.'.join(map(str, place))} = {str(now)[:60]!r}"


def config(chance: random.Random, directory: Path) -> str:
    return spoil_json(chance, directory / "config.json")


ADDED: dict[
    str, tuple[Any, ...]
] = {  # keys that configs in the wild have, and that change how a model is built or called
    "return_dict": (False, [], None),
    "use_cache": (False, False, None),
    "output_hidden_states": (True,),
    "output_attentions": (True,),
    "_attn_implementation": ("flash_attention_2", "eager", "x", 3),
    "attn_implementation": ("flash_attention_2", "x", {}),
    "experts_implementation": ("x",),
    "dtype": ("float16", "bfloat16", "x", "int8", "auto", None),
    "torch_dtype": ("float16", "x"),
    "layer_types": (["x"], ["sliding_attention"] * 3, ["full_attention"]),
    "sliding_window": (0, -1, 2, "x"),
    "quantization_config": ({}, {"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, "x", [1]),
    "auto_map": ({"AutoConfig": "x.Y"}, None, 3),
    "attention_bias": (True, "x"),
    "mlp_bias": (True,),
    "head_dim": (7, 0, 16, -8, None),
    "architectures": (["BertModel"], None, "x", 3, ["AlignXForCausalLM"]),
    "is_encoder_decoder": (True,),
    "is_decoder": (False, True),
    "gradient_checkpointing": (True,),
    "torchscript": (True,),
    "chunk_size_feed_forward": (3,),
    "id2label": ({"0": "x"}, 3, {"x": "y"}),
    "num_labels": (3, "x"),
    "max_length": (3, "x"),
    "temperature": (0.3, "x"),
    "do_sample": (True,),
    "bad_words_ids": (3, [[1]]),
    "attention_dropout": (0.5, 1.0, 2.0, -1.0),
    "hidden_act": ("gelu", "x", "relu2"),
    "rms_norm_eps": (0.0, -1.0, 1e300, "nan"),
    "pretraining_tp": (2, 0),
    "tie_word_embeddings": (True,),
    "pad_token_id": (-1, 646, 647),
    "base_model_tp_plan": (3, {"x": "y"}),
    "transformers_version": ("1.0", 3),
    "model_type": ("mistral", "gemma", "qwen2", "qwen3", "bert", "alignx", "Llama", " llama", "t5"),
}


def added(chance: random.Random, directory: Path) -> str:
    key = chance.choice(sorted(ADDED))
    content = json.loads((directory / "config.json").read_text())
    content[key] = chance.choice(ADDED[key])
    (directory / "config.json").write_text(json.dumps(content))
    return f"{key}={content[key]!r}"


def adapter_config(chance: random.Random, directory: Path) -> str:
    return spoil_json(chance, directory / "adapter_config.json")


def rope(chance: random.Random, directory: Path) -> str:
    content = json.loads((directory / "config.json").read_text())
    kind = chance.choice(("linear", "dynamic", "yarn", "longrope", "llama3", "default", "x", None, 3))
    made = {"rope_type": kind, "rope_theta": chance.choice((1e4, 0, -1, None, "x", 1e300))}
    made |= {"factor": chance.choice((2.0, 0, -1, "x", None))} if chance.random() < 0.7 else {}
    content[chance.choice(("rope_parameters", "rope_scaling"))] = made
    (directory / "config.json").write_text(json.dumps(content))
    return str(made)


def generation(chance: random.Random, directory: Path) -> str:
    return spoil_json(chance, directory / "generation_config.json")


def tokenizer(chance: random.Random, directory: Path) -> str:
    return spoil_json(chance, directory / chance.choice(("tokenizer.json", "tokenizer_config.json")))


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "nowhere"}
ENCODERS: tuple[dict[str, Any], ...] = (
    {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
    {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}},
    {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 7}},
    {"model": WORDS},
    {"model": WORDS | {"vocab": {"a": 0, "nowhere": 4 * 10**9}}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}},
    {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}},
)


def encoder(chance: random.Random, directory: Path) -> str:
    """A tokenizer that can be read, but can't encode every text."""
    content = json.loads((directory / "tokenizer.json").read_text())
    chosen = chance.choice(ENCODERS)
    (directory / "tokenizer.json").write_text(json.dumps(content | chosen))
    return str(chosen)


def files(chance: random.Random, directory: Path) -> str:
    """One file is gone, is a folder, or is another model's."""
    file = chance.choice(sorted(p for p in directory.iterdir() if p.is_file()))
    file.unlink()
    what = chance.choice(("gone", "folder", "adapter", "pickle", "dangling"))
    if what == "folder":
        file.mkdir()
    elif what == "adapter":
        (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    elif what == "pickle":
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    elif what == "dangling":
        file.symlink_to(directory / "nowhere")
    return f"{file.name} is gone: {what}"


# --- templates ----------------------------------------------------------------------------------------------------

SNIPPETS: tuple[str, ...] = (
    *("", " ", "{{ messages }}", "{% for m in messages %}", "{% if %}", "{{ 1/0 }}", "{{ x.y.z }}", "\0", "\x1b[31m"),
    *("{{ messages[9].role }}", "{{ raise_exception('no') }}", "{{ raise_exception() }}", "{{ bos_token + 3 }}"),
    *("{% for i in range(10**9) %}x{% endfor %}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    *("{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ 'x' * 10**9 }}", "{{ messages | tojson }}"),
    *("{{ strftime_now('%Y') }}", "{{ strftime_now(3) }}", "{{ nothing() }}", "{% set messages = 3 %}"),
    *("{{ messages.append(1) }}", "{% break %}", "{{ m.content | nofilter }}", "{% generation %}x{% endgeneration %}"),
)


def template(chance: random.Random, directory: Path) -> str:
    """Cut off, with an expression in its midst, without a part, or not UTF-8."""
    file = directory / TEMPLATE
    whole = file.read_text()
    what = chance.choice(("cut", "insert", "alone", "without", "bytes"))
    text = {
        "cut": whole[: chance.randrange(len(whole))],
        "insert": (place := chance.randrange(len(whole))) and whole[:place] + chance.choice(SNIPPETS) + whole[place:],
        "alone": chance.choice(SNIPPETS),
        "without": whole[:place] + whole[place + chance.randrange(1, 20) :],
        "bytes": whole,
    }[what] or ""
    file.write_bytes(text.encode() + (b"\xff\xfe" if what == "bytes" else b""))
    return f"{what}: {text[-60:]!r}"


KINDS: dict[str, tuple[Spoil, int, int]] = {  # how many directories, and how many of them at least are refused
    "weights": (weights, 30, 15),
    "header": (header, 30, 25),
    "shards": (shards, 16, 12),
    "config": (config, 50, 25),
    "added": (added, 40, 8),
    "rope": (rope, 16, 12),
    "generation": (generation, 16, 2),
    "tokenizer": (tokenizer, 40, 20),
    "encoder": (encoder, 12, 8),
    "files": (files, 16, 10),
    "template": (template, 30, 20),
}
ALIGNED: dict[str, tuple[Spoil, int, int]] = {
    "weights": (weights, 10, 4),
    "header": (header, 10, 8),
    "config": (config, 40, 20),
    "generation": (generation, 10, 1),
    "tokenizer": (tokenizer, 10, 3),
    "files": (files, 10, 8),
}
ADAPTERS: dict[str, tuple[Spoil, int, int]] = {
    "weights": (weights, 20, 10),
    "header": (header, 10, 8),
    "adapter_config": (adapter_config, 50, 15),
}
