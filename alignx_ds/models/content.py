"""What a model directory holds, as hashes: two directories with the same content are the same model, wherever they lie.

Every file counts that may decide how a text is encoded, how an answer is computed or where it ends: the config, the
weights, and all files of the tokenizer, its chat templates and the generation config.
"""

from __future__ import annotations

from pathlib import Path

from alignx_ds.models.stored import weight_files
from alignx_ds.runs import manifest

SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")


def hashes(directory: Path) -> dict[str, str]:
    """By path within the directory: the hash of every such file. Files that no loader reads are left out."""
    found = {path for pattern in SETTINGS for path in directory.glob(pattern) if path.name != manifest.NAME}
    found |= set(weight_files(directory))
    return {str(path.relative_to(directory)): manifest.file_hash(path) for path in sorted(found) if path.is_file()}
