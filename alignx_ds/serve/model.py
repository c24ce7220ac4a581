"""An aligned model on disk, or a dense one, and its tokenizer, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.mocae.backbones import BACKBONES
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import LowerLayers, load_answering, load_gate
from alignx_ds.models.ends import answering_tokenizer
from alignx_ds.models.registration import MODEL_TYPE
from alignx_ds.runtime import distributed


def load(directory: str) -> tuple[AlignXForCausalLM, PreTrainedTokenizerBase]:
    """On this process's device, in eval mode. Raises ConfigError, or DataError where there is no aligned model."""
    given = Path(directory)
    _check_aligned(given, directory)
    model, tokenizer = _loaded(given, directory)
    return cast(AlignXForCausalLM, model), tokenizer


def _check_aligned(given: Path, directory: str) -> None:
    pretrained.check(given, "model", directory)
    if not (given / "config.json").is_file() or pretrained.model_type(given, "model", directory) != MODEL_TYPE:
        raise DataError(f"{directory}: no aligned model there; give the model directory of a finished run")


def load_any(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same for a run's directory too, and for a dense model of an architecture that this project knows."""
    given = model_directory(directory)
    if not (pretrained.check(given, "model", directory) / "config.json").is_file():
        raise DataError(f"{directory}: no model there; give a finished run's directory, or a model's")
    kind = pretrained.model_type(given, "model", directory)
    if kind not in (MODEL_TYPE, *BACKBONES):
        raise DataError(f"{directory}: a model of the type {kind}; served are {', '.join((MODEL_TYPE, *BACKBONES))}")
    return _loaded(given, directory)


def load_router(directory: str) -> tuple[LowerLayers, PreTrainedTokenizerBase]:
    """The gate of an aligned model, or of a run's. Raises ConfigError, or DataError where there is no aligned model."""
    given = model_directory(directory)
    _check_aligned(given, directory)
    logging.disable_progress_bar()
    model = load_gate(given)
    if model.config.gate["scope"] != "shared":
        fix = "an adapter changes all layers alike; serve the model itself"
        raise ConfigError(Problem("gate.scope", model.config.gate["scope"], "shared, for a router", fix))
    tokenizer = answering_tokenizer(given, "model", directory)
    model.to(distributed.device()).eval()
    return model, tokenizer


def model_directory(given: str) -> Path:
    """The directory itself, or that of the model in a run's directory."""
    run = Path(given)
    return run / "model" if (run / "config.yaml").is_file() and not (run / "config.json").is_file() else run


def _loaded(directory: Path, given: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    logging.disable_progress_bar()
    model, tokenizer = load_answering(directory, "model", given)
    model.to(distributed.device()).eval()
    return model, tokenizer
