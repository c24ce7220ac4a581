"""Trainers of transformers and TRL, on stage 1's rows and DeepSpeed JSON, made to run a few steps at a time."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from alignx_ds.data.batches import collate, pack
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.sampling import global_batches
from alignx_ds.runtime import distributed
from alignx_ds.training.engine import ADAM, Plan
from suite.systems import Setting
from suite.training import PAD, SEED, specialist

TRAINER, TRL = "transformers' Trainer", "TRL's SFTTrainer"


class Driven(TrainerCallback):
    """A trainer in a thread of its own, which waits after every `count` optimizer steps that `steps` has asked for."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.left = 0
        self.failure: BaseException | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        trainer.add_callback(self)

    def steps(self, count: int) -> None:
        self.left = count
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the training, and free its engine."""
        self.left = -1
        self._go.release()
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        self.trainer.accelerator.free_memory()

    def _run(self) -> None:
        try:
            self.trainer.train()
        except BaseException as failure:  # noqa: BLE001 - `steps` raises it in the thread that waits
            self.failure = failure
        self._done.release()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self._done.release()
            self._go.acquire()
            control.should_training_stop = self.left < 0


def driven(
    kind: str,
    setting: Setting,
    rows: LabelledExamples,
    plan: Plan,
    deepspeed: dict[str, Any],
    steps: int,
    *,
    packed: bool,
) -> Driven:
    """Trains the same model on the same micro batches in the same order as our loop, for at most `steps` steps.

    What they would do beside training is switched off: logs, progress, checkpoints.
    """
    order = [i for chosen in global_batches(len(rows.examples), plan.batch, steps, SEED) for i in chosen]
    given = [rows.examples[i] for i in order]
    columns = {"input_ids": [list(e.ids) for e in given], "prompt_length": [e.prompt_length for e in given]}
    options: dict[str, Any] = {
        "output_dir": str(Path("/nonexistent")),  # nothing is saved
        "max_steps": steps,
        "per_device_train_batch_size": plan.micro_batch(distributed.world_size()),
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "adam_beta2": ADAM["betas"][1],
        "max_grad_norm": plan.clip,
        "bf16": plan.bf16,
        "use_cpu": setting.device == "cpu",
        "deepspeed": copy.deepcopy(deepspeed),
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": setting.device != "cpu",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    shared: dict[str, Any] = {"train_dataset": Dataset.from_dict(columns), "data_collator": Collator(packed=packed)}
    AcceleratorState._reset_state()  # or a second trainer of one process would be refused
    if kind == TRAINER:
        return Driven(Trainer(specialist(setting), TrainingArguments(**options), **shared))
    from trl import SFTConfig, SFTTrainer

    sft = {"gradient_checkpointing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    tokenizer = _tokenizer()
    return Driven(SFTTrainer(specialist(setting), SFTConfig(**options, **sft), **shared, processing_class=tokenizer))


class Collator:
    """Makes the micro batch that our loop makes of these rows."""

    def __init__(self, *, packed: bool) -> None:
        self.packed = packed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [Example(tuple(row["input_ids"]), row["prompt_length"]) for row in rows]
        batch = pack(examples, PAD) if self.packed else collate(examples, PAD)
        made = {"input_ids": batch.input_ids, "labels": batch.labels}
        if batch.position_ids is None:
            return made | {"attention_mask": batch.attention_mask}
        return made | {"position_ids": batch.position_ids}


def _tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer asks for one, and here has nothing to do for it."""
    words = Tokenizer(WordLevel({"<pad>": PAD, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
