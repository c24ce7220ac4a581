"""`import alignx_ds` is all that transformers needs to load an aligned model, in any order of imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from alignx_ds.models import registration


def run(program: str, repo_root: Path) -> list[str]:
    """The words that the program prints, in a process of its own: in this one everything is imported already."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


IMPORTS = (
    "import alignx_ds, transformers",
    "import transformers.models.auto.auto_mappings, alignx_ds",
    "import transformers.models.auto.modeling_auto, alignx_ds",
)


@pytest.mark.parametrize("imports", IMPORTS)
def test_auto_classes_and_pipelines_load_an_aligned_model(saved_aligned: Path, repo_root: Path, imports: str) -> None:
    program = f"""
{imports}
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
print(AutoConfig.from_pretrained({str(saved_aligned)!r}).model_type)
print(type(AutoModelForCausalLM.from_pretrained({str(saved_aligned)!r})).__name__)
generator = pipeline("text-generation", {str(saved_aligned)!r})
print(type(generator.model).__name__, len(generator("the", max_new_tokens=2)))
import transformers.models.auto.auto_mappings as table
print(AutoConfig.for_model("llama").model_type, table.CONFIG_MAPPING_NAMES["llama"])
"""
    expected = ["alignx", "AlignXForCausalLM", "AlignXForCausalLM", "1", "llama", "LlamaConfig"]
    assert run(program, repo_root) == expected


def test_the_import_is_light_and_leaves_the_import_system_alone(repo_root: Path) -> None:
    program = """
import sys
before = list(sys.meta_path), list(sys.path_hooks)
import alignx_ds, alignx_ds.cli
print((sys.meta_path, sys.path_hooks) == before, *(m for m in ("torch", "transformers") if m in sys.modules))
from transformers import AutoModelForCausalLM  # some versions import scikit-learn for it, whoever asks
theirs = set(sys.modules)
import alignx_ds.pipeline
print(*(m for m in ("sklearn", "matplotlib", "deepspeed") if m in set(sys.modules) - theirs))
"""
    assert run(program, repo_root) == ["True"]


def test_without_the_table_the_public_way_registers_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "AUTO_CLASSES", "not imported")
    monkeypatch.setattr(registration, "TABLE", "transformers.models.auto.no_such_table")
    registration.register()
    assert AutoConfig.for_model("alignx").model_type == "alignx"


def test_an_unknown_model_type_is_still_refused() -> None:
    with pytest.raises(ValueError, match="Unrecognized"):
        AutoConfig.for_model("no-such-model")
