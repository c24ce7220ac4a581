"""The systems that a run compares: the base model, the specialists, the baselines, and the aligned model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from alignx_ds.baselines.merged import Merge, add_merged, merge_of
from alignx_ds.config.schema import MERGES, NO_OUTPUT_CALIBRATION, RunConfig
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.endpoint import ANSWERS, key_from, listed_models
from alignx_ds.evaluation.evaluate import System
from alignx_ds.experts.task_vectors import add_task_vector
from alignx_ds.mocae.layer import output_calibrations
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runtime import distributed
from alignx_ds.stages import fuse
from alignx_ds.stages.finetune import MIXED


@dataclass(frozen=True)
class Trained:
    """The directories of the models that a run has trained."""

    specialists: dict[str, Path]  # by axis
    fine_tunes: dict[str, Path]  # by baseline: sequential, mixed, and those that mend the sequential one
    fusions: dict[str, Path]  # by baseline: h3fusion, trinityx, where the recipe lists them
    aligned: Path


def compared_systems(config: RunConfig, base: BaseModel, trained: Trained) -> list[System]:
    """In the order of the report's tables. Merges are not trained: each load computes them from the specialists."""
    axes, specialists = list(config.axes), list(trained.specialists.values())
    of_base = {"base": base.digest, "dtype": config.model.dtype}
    systems = [System("base", of_base, partial(load_base, base))]
    for name, directory in (trained.specialists | trained.fine_tunes).items():
        provenance = of_base | {"specialist": _fingerprint(directory)}
        systems.append(System(name, provenance, partial(load_specialist, base, directory)))
    merged = [[axis, _fingerprint(directory)] for axis, directory in trained.specialists.items()]
    of_specialists = of_base | {"specialists": merged}
    for name in (name for name in MERGES if name in config.baselines.make):
        merge, settings = merge_of(name, config.baselines, axes, config.seed)
        load = partial(load_merged, base, specialists, merge)
        systems.append(System(name, of_specialists | {name: settings}, load))
    for name, directory in trained.fusions.items():
        provenance = of_base | {name: _fingerprint(directory)}
        systems.append(System(name, provenance, partial(load_fusion, base, name, directory)))
    provenance = of_base | {"aligned": _fingerprint(trained.aligned)}
    return [*systems, System("alignx", provenance, partial(load_aligned, base, trained.aligned))]


def ablated_systems(config: RunConfig, base: BaseModel, aligned: Path) -> list[System]:
    """The aligned model without a part of it, for the report's ablations; only parts that it has."""
    if not config.gate.output_latent:
        return []
    provenance = {"base": base.digest, "dtype": config.model.dtype, "aligned": _fingerprint(aligned)}
    load = partial(load_without_output_calibration, base, aligned)
    return [System(NO_OUTPUT_CALIBRATION, provenance | {"ablation": NO_OUTPUT_CALIBRATION}, load)]


def system_names(config: RunConfig) -> list[str]:
    """All that the run evaluates: those that it compares, and the ablations."""
    ablations = [NO_OUTPUT_CALIBRATION] if config.gate.output_latent else []
    return ["base", *config.axes, "sequential", MIXED, *config.baselines.make, "alignx", *ablations]


def served_systems(config: RunConfig) -> frozenset[str]:
    """The systems that `evaluation.endpoint` has a model of; none where it is empty. Asks the server for its models.

    Raises ConfigError where the server can't be asked, or has none of them, and ModuleNotFoundError without its client.
    """
    url, names = config.evaluation.endpoint, system_names(config)
    if not url:
        return frozenset()
    import openai  # noqa: F401 (to fail here, and not after the training)

    expected = "the /v1 of a server with models named as the run's systems"
    listed = listed_models(url, key_from(), ANSWERS.address, expected)
    if not (found := frozenset(names).intersection(listed)):
        fix = f"it has {', '.join(map(str, listed)) or 'none'}; serve one or more of {', '.join(names)}"
        raise ConfigError(Problem(ANSWERS.address, url, expected, fix))
    return found


def _fingerprint(directory: Path) -> str:
    found: str = manifest.read(directory)["fingerprint"]
    return found


def load_base(base: BaseModel) -> PreTrainedModel:
    """The base model, on this rank's device."""
    return backbone.load_backbone(base).to(distributed.device())


def load_specialist(base: BaseModel, directory: Path) -> PreTrainedModel:
    """The base model plus the task vector in this directory."""
    model = backbone.load_backbone(base)
    add_task_vector(model, base, directory)
    return model.to(distributed.device())


def load_merged(base: BaseModel, specialists: list[Path], merge: Merge) -> PreTrainedModel:
    """The base model plus the merged task vectors of these specialists."""
    model = backbone.load_backbone(base)
    add_merged(model, base, specialists, merge)
    return model.to(distributed.device())


def load_fusion(base: BaseModel, name: str, directory: Path) -> PreTrainedModel:
    """The trained fusion of this name."""
    return fuse.load(name, base, directory).to(distributed.device())


def load_aligned(base: BaseModel, directory: Path) -> AlignXForCausalLM:
    """The aligned model, ready to answer."""
    model = backbone.load_aligned(directory, base.dtype)
    model.to(distributed.device()).eval()
    return model


@torch.no_grad()
def load_without_output_calibration(base: BaseModel, directory: Path) -> AlignXForCausalLM:
    """The aligned model with R = 0: its layers return the experts' mixture as it is."""
    model = load_aligned(base, directory)
    for calibration in output_calibrations(model):
        calibration.reinjection.zero_()
    return model
