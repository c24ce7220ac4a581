"""TRL's trainers take a dense export as they take any model of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from alignx_ds import cli

pytestmark = pytest.mark.usefixtures("no_launcher")


def test_sft_trains_a_dense_export(finished_run: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    assert cli.main(["export", "dense", str(finished_run), str(tmp_path / "dense"), "--axes", "honest"]) == 0
    turns = [("user", "how are you ?"), ("assistant", "i am well .")]
    rows = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4)
    options = {"max_steps": 1, "learning_rate": 1e-3, "use_cpu": not torch.cuda.is_available(), "report_to": "none"}
    trainer = SFTTrainer(str(tmp_path / "dense"), SFTConfig(str(tmp_path / "trained"), **options), train_dataset=rows)
    assert 0 < trainer.train().training_loss < 20
    trainer.save_model()
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "trained"))
    assert type(after) is type(before)
    changed = [n for n, p in after.state_dict().items() if not torch.equal(p.float(), before.state_dict()[n].float())]
    assert len(changed) > 10
