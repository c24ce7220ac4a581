"""Model directories with one trait each, made from the world's base model, whose weights they link to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignx_ds.models.base import WORLD_BASES

LOOP = (
    "{% for m in messages %} <{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
ASK = "{% if add_generation_prompt %} <assistant> {% endif %}"
REFUSING = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + LOOP
    + ASK
)
DROPPING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + LOOP + ASK
)
DEFAULTING = "{{ bos_token }}{% if messages[0].role != 'system' %} <system> be well . {% endif %}" + LOOP + ASK
THINKING = (
    "{{ bos_token }}"
    + LOOP
    + ASK
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    " not well . {% endif %}"
)


def model_directory(path: Path, template: str | None = "", **files: Any) -> Path:
    """The world's base model under `path`. A `template` is its chat_template.jinja, and None removes that.

    A keyword names a JSON file, and holds the values that are changed in it; None removes a value.
    """
    path.mkdir(parents=True)
    for file in WORLD_BASES["world"].iterdir():
        if file.suffix == ".safetensors":
            (path / file.name).symlink_to(file)
        else:
            (path / file.name).write_bytes(file.read_bytes())
    if template != "":
        (path / "chat_template.jinja").unlink()
    if template:
        (path / "chat_template.jinja").write_text(template)
    for name, values in files.items():
        edit(path / f"{name}.json", **values)
    return path


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
