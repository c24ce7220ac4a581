"""An aligned model on disk and its tokenizer, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from alignx_ds.errors import DataError
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import load_answering
from alignx_ds.models.registration import MODEL_TYPE
from alignx_ds.runtime import distributed


def load(directory: str) -> tuple[AlignXForCausalLM, PreTrainedTokenizerBase]:
    """On this process's device, in eval mode. Raises ConfigError, or DataError where there is no aligned model."""
    given = Path(directory)
    pretrained.check(given, "model", directory)
    if not (given / "config.json").is_file() or pretrained.model_type(given, "model", directory) != MODEL_TYPE:
        raise DataError(f"{directory}: no aligned model there; give the model directory of a finished run")
    logging.disable_progress_bar()
    model, tokenizer = load_answering(given, "model", directory)
    model.to(distributed.device()).eval()
    return cast(AlignXForCausalLM, model), tokenizer
