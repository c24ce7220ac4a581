"""An export's own code, `modeling_alignx.py`: loaded where this package can't be imported, it is the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import aligned, attention_experts, base_model, low_rank_experts, padded, random_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from alignx_ds.errors import ConfigError
from alignx_ds.export import remote_code
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import pretrained
from alignx_ds.models.registration import AUTO_MAP
from alignx_ds.serve.model import load

PROMPT = "hello , how are you ?"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
WITHOUT_US = """
import sys
sys.modules.update(alignx_ds=None, deepspeed=None)  # Python then finds no such package
"""
LOADED = """
import json
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

torch.set_grad_enabled(False)
root = Path(sys.argv[1])
given, greedy = load_file(root / "given.safetensors"), dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
for place in sorted(root.glob("*-1.0")):
    try:
        AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False)
    except ValueError as error:
        refused = str(error)
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    made = {
        "logits": model(**given).logits,
        "cached": model.generate(**given, **greedy),
        "uncached": model.generate(**given, **greedy, use_cache=False),
    }
    save_file(made, place / "made.safetensors")
    ask = pipeline("text-generation", str(place), trust_remote_code=True)
    (answer,) = ask("hello , how are you ?", max_new_tokens=5, do_sample=False, return_full_text=False)
    said = {"refused": refused, "module": type(model).__module__, "answer": answer["generated_text"]}
    (place / "said.json").write_text(json.dumps(said))
"""
BOTH = """
import sys
from transformers import AutoModelForCausalLM

for imported in (False, True):
    if imported:
        import alignx_ds
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/out", trust_remote_code=True)
        print(type(model).__module__.partition(".")[0])
"""


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "choice", "scope": "per_layer"},
    "qwen3": {"kind": "needs", "combine": "weights"},
    "gemma": {"kind": "needs", "top_k": 2, "output_latent": 0},
    "gemma2": {"kind": "choice", "scope": "shared"},
    "mixtral": {"kind": "choice", "scope": "shared"},
}


def tiny(tokenizer: PreTrainedTokenizerBase, family: str) -> AlignXForCausalLM:
    """With the world's vocabulary."""
    base = base_model(family=family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    experts = attention_experts(base) if family == "qwen3" else low_rank_experts(base)
    return aligned(base, experts, **MODELS[family])


def run(program: str, root: Path) -> str:
    """What it prints, in a process of its own, which keeps its copies of exports' modules below `root`."""
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-c", program, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    ids, mask = padded(random_rows([5, 9, 7]), "left")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def elsewhere(
    world_tokenizer: PreTrainedTokenizerBase, given: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The exports of MODELS, and what a process without this package and without DeepSpeed made of them."""
    root = tmp_path_factory.mktemp("exports")
    for family in MODELS:
        place = root / f"{family}-1.0"  # transformers makes a package's name of it
        remote_code.save(tiny(world_tokenizer, family), place, "20KB")
        world_tokenizer.save_pretrained(place)
    save_file(given, root / "given.safetensors")
    run(WITHOUT_US + LOADED, root)
    return root


@pytest.fixture
def exported(world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    remote_code.save(tiny(world_tokenizer, "llama"), tmp_path / "out", "5GB")
    return tmp_path / "out"


@pytest.mark.parametrize("family", MODELS)
def test_where_the_package_is_missing_the_model_is_the_same(
    elsewhere: Path, world_tokenizer: PreTrainedTokenizerBase, given: dict[str, torch.Tensor], family: str
) -> None:
    model, place = tiny(world_tokenizer, family), elsewhere / f"{family}-1.0"
    made, said = load_file(place / "made.safetensors"), json.loads((place / "said.json").read_text())
    assert said["module"].startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(made["logits"], model(**given).logits)
    assert made["cached"].tolist() == made["uncached"].tolist() == model.generate(**given, **GREEDY).tolist()
    prompt = world_tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, **GREEDY | {"max_new_tokens": 5})[0, prompt.shape[1] :]
    assert said["answer"] == world_tokenizer.decode(answer, skip_special_tokens=True)


def test_without_trust_transformers_names_the_option(elsewhere: Path) -> None:
    for place in elsewhere.glob("*-1.0"):
        refused = json.loads((place / "said.json").read_text())["refused"]
        assert "contains custom code which must be executed" in refused and "trust_remote_code=True" in refused


def test_once_imported_the_package_s_own_classes_are_used(exported: Path) -> None:
    assert run(BOTH, exported.parent).split() == [*["transformers_modules"] * 2, *["alignx_ds"] * 2]
    assert type(AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)) is AlignXForCausalLM


def test_it_needs_torch_and_transformers_alone(exported: Path) -> None:
    """What transformers looks for before it runs the file; what stands in a `try` is not needed."""
    file = exported / "modeling_alignx.py"
    assert set(get_imports(file)) - sys.stdlib_module_names == {"torch", "transformers"}
    assert not get_relative_imports(file)


def test_two_modules_do_not_define_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = remote_code._text
    more = {"alignx_ds.mocae.turns": "\n\ndef distances() -> None: ...\n"}  # natural.py has one
    monkeypatch.setattr(remote_code, "_text", lambda module: text(module) + more.get(module, ""))
    with pytest.raises(AssertionError, match="distances"):
        remote_code.source()


def test_our_own_commands_read_an_export_and_no_other_code(
    world_tokenizer: PreTrainedTokenizerBase, exported: Path
) -> None:
    world_tokenizer.save_pretrained(exported)
    (exported / "modeling_alignx.py").write_text("raise SystemExit('it ran')")
    assert type(load(str(exported))[0]) is AlignXForCausalLM
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    for other in ({"model_type": "llama"}, {"auto_map": AUTO_MAP | {"AutoConfig": "code.Config"}}, {"auto_map": None}):
        (exported / "config.json").write_text(json.dumps(config | other))
        with pytest.raises(ConfigError, match="auto_map"):
            pretrained.check(exported, "model", "out")
