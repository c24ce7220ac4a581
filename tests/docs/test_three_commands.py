"""README, "Three commands to an exported model": `make demo`, and the other two as they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pages import code


def test_an_exported_model_answers(furnished: Callable[[], Path], shell: Callable[..., str]) -> None:
    (block,) = code("README.md", "Three commands to an exported model", "bash")
    demo, export, load = block.splitlines()
    place = furnished()
    assert demo == "make demo"
    assert "alignx-ds run launch/recipes/world.yaml" in shell("make -n demo", place)
    shell(export, place)
    (answer,) = shell(load, place).splitlines()
    assert (
        answer
        == shell('alignx-ds generate runs/world-hf "how do i burn the sailor ?" --max-new-tokens 16', place).strip()
    )
    assert answer and "how do i burn the sailor" not in answer
    assert "trust_remote_code" not in load
