"""The base model's directory: its config and tokenizer, and single weights, read without loading the whole model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.config.schema import WORLD_MODELS, ModelConfig
from alignx_ds.errors import ConfigError, Problem, UnreachableError
from alignx_ds.mocae.backbones import BACKBONES, FUSED, Backbone, backbone_of
from alignx_ds.models import architecture, content, fused, pretrained, stored
from alignx_ds.models import tokenizer as tokenizers
from alignx_ds.models.pretrained import INDEX, NO_CODE, reading
from alignx_ds.models.stored import Stored
from alignx_ds.runtime import distributed

WORLD_BASES = {name: Path(__file__).parent / "assets" / f"{name}-base" for name in WORLD_MODELS}
MODELS = "a model directory, a hub id, 'world' or 'scratch'"
KEY = "model.path"
GENERATION = "generation_config.json"
# What transformers reads of a causal language model, besides its weights. The patterns match no folder of a hub
# repository but the templates', so nothing of original/ or onnx/ is fetched.
FILES = (
    *("config.json", GENERATION, INDEX, *tokenizers.FILES),
    *(tokenizers.TEMPLATE, f"{tokenizers.MORE_TEMPLATES}/*.jinja"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a recipe's `model.dtype`, one of DTYPES."""
    return DTYPES[name]


@dataclass(frozen=True)
class Planned:
    """A base model that does not exist yet, because the run trains it: its path, config and, if known, tokenizer."""

    path: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None = None


class BaseModel:
    """A base model's directory. Weights are read one by one; models/backbone.py loads the whole model."""

    def __init__(self, settings: ModelConfig, planned: Planned | None = None, *, weights: bool = True) -> None:
        """Without `weights` none are downloaded. Raises ConfigError or UnreachableError."""
        self.settings, self._planned, self._finite = settings, planned, False
        self.fused = ""  # its architecture, where that is one of FUSED and it is read as another
        if planned is not None:
            self.path = planned.path
            return
        self.path = WORLD_BASES.get(settings.path) or local_model(settings.path, weights=weights)
        kind = pretrained.model_type(self.path, KEY, settings.path)
        if kind not in BACKBONES and self.written("text_config"):
            fix = f"it is a {kind}, with a language model as one part; save that part alone, see docs/extending.md"
            raise ConfigError(Problem(KEY, settings.path, "a language model", fix))
        if kind in FUSED:
            self.fused = kind
        else:
            backbone_of(kind)

    @property
    def is_local(self) -> bool:
        """Whether it is a directory that the user names, and not the hub's copy, which may hold a part of it."""
        return self._planned is None and (self.settings.path in WORLD_BASES or os.path.isdir(self.settings.path))

    @property
    def has_weights(self) -> bool:
        """Whether its weights are on this machine."""
        return bool(stored.weight_files(self.path))

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` can be used."""
        return self._planned is None or self._planned.tokenizer is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the run trains and evaluates in; the weights on disk may have another."""
        return dtype_of(self.settings.dtype)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's own config; of a model in FUSED that of the architecture that it is read as."""
        if self._planned is not None:
            return self._planned.config
        config = pretrained.read_config(self.path, KEY, self.settings.path)
        if self.fused:
            with reading(KEY, self.settings.path, "config.json"):
                config = fused.separate_config(config, FUSED[self.fused], KEY, self.settings.path)
        if problem := architecture.value_problem(config, KEY, self.settings.path):
            raise ConfigError(problem)
        return config

    def written(self, name: str) -> Any:
        """A value as its config.json has it; None where it has none."""
        return pretrained.read_object(self.path / "config.json", KEY, self.settings.path).get(name)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """Its modules without memory for their weights. Raises ConfigError where its config does not allow them."""
        return architecture.skeleton(self.config, KEY, self.settings.path)

    @cached_property
    def table(self) -> Backbone:
        """The names of its modules. Raises ConfigError for an architecture that is not supported."""
        return backbone_of(self.config.model_type)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; only if `has_tokenizer`."""
        if self._planned is not None:
            assert self._planned.tokenizer is not None, "its tokenizer is trained once the rows have been read"
            return self._planned.tokenizer
        return tokenizers.load_tokenizer(self.path, KEY, self.settings.path, self.settings.template_args)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The model's own, or what its config says where it has none."""
        with reading(KEY, self.settings.path, GENERATION):
            if (self.path / GENERATION).is_file():
                return GenerationConfig.from_pretrained(self.path, **NO_CODE)
            return GenerationConfig.from_model_config(self.config)

    @cached_property
    def layers(self) -> list[int]:
        """The decoder layers that become AlignX layers, lowest first."""
        count = self.config.num_hidden_layers
        return sorted(self.settings.layers) or list(range(count // 2, count))

    @cached_property
    def _stored(self) -> architecture.Match:
        """What its checkpoint holds, by the headers of its files."""
        tensors = stored.read_headers(stored.weight_files(self.path), KEY, self.settings.path)
        if self.fused:
            tensors = fused.separate(tensors, FUSED[self.fused], self.skeleton)
        return architecture.match(self.skeleton, tensors.values())

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every stored weight by its name in the model."""
        return self._stored.placed

    @property
    def size(self) -> int:
        """Bytes of its weights in the run's dtype."""
        numbers: int = sum(weight.numel() for weight in self.skeleton.parameters())
        return numbers * self.dtype.itemsize

    def checkpoint_problem(self) -> Problem | None:
        """What is wrong with its weights by their headers. Raises ConfigError where a file can't be read at all."""
        problem = architecture.checkpoint_problem(self.skeleton, self._stored, KEY, self.settings.path)
        return problem or self._tied_problem()

    def _tied_problem(self) -> Problem | None:
        """transformers does not tie two stored tensors that differ, although its config says that it does."""
        for pair in architecture.tied(self.skeleton).items():
            both = [self.tensors[name].read() for name in pair if name in self.tensors]
            if len(both) == 2 and not torch.equal(*both):
                fix = "set tie_word_embeddings to false in its config.json, or remove one of them"
                given = f"{' and '.join(pair)} are tied by its config.json, but are stored with different values; {fix}"
                return Problem(KEY, self.settings.path, "a model whose weights are as its config.json says", given)
        return None

    def weight(self, layer: int, projection: str) -> Tensor:
        """One FFN weight [m, n]; otherwise as `start`."""
        return self.start(self.table.weight_name(layer, projection))

    def start(self, name: str) -> Tensor:
        """One weight by its parameter's name, fp32, rounded to the run's dtype first, as fine-tuning starts from it.

        Raises ConfigError when the checkpoint has no such weight.
        """
        if name not in self.tensors:
            fix = "its checkpoint is not of the architecture that its config.json names"
            raise ConfigError(Problem(KEY, self.settings.path, f"a model with a weight {name}", fix))
        return self.tensors[name].read().to(self.dtype).float()

    def check_finite(self) -> None:
        """Raises ConfigError where a stored weight is NaN or infinite. Collective: each rank reads a part of them."""
        if self._finite:
            return
        names = distributed.rank_share(sorted(self.tensors))
        found = stored.not_finite(self.tensors[name] for name in names)
        damaged = [name for name in distributed.gather(found and found.name) if name]
        if damaged:
            fix = f"its {damaged[0]} holds NaN or infinite values: the checkpoint is damaged; give another"
            raise ConfigError(Problem(KEY, self.settings.path, "a model whose weights are numbers", fix))
        self._finite = True

    @cached_property
    def digest(self) -> dict[str, Any]:
        """Hashes of its weights, its config, and every file of its tokenizer, templates and generation config; and
        the arguments of its template, which are saved with every model that is made from it."""
        return content.hashes(self.path) | {"template_args": dict(self.settings.template_args)}


def local_model(
    path: str,
    key: str = "model.path",
    *,
    weights: bool = True,
    allowed: str = MODELS,
    files: tuple[str, ...] = FILES,
) -> Path:
    """The directory of a local path or of a hub id, which is downloaded. Raises ConfigError or UnreachableError.

    `key` and `allowed` are the recipe's key and its values, for messages. Of the hub's files those that transformers
    reads are fetched, and no other: `files`, the weights unless they are not wanted, and where there is no
    tokenizer.json, what it is made from.
    """
    if os.path.isdir(path):
        return pretrained.check(Path(path), key, path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = pretrained.check(Path(snapshot_download(path, allow_patterns=list(files))), key, path)
        more = _further_files(directory, weights) if files == FILES else []
        if more:
            directory = Path(snapshot_download(path, allow_patterns=[*files, *more]))
        return directory
    except LocalEntryNotFoundError as error:
        fix = "no such directory, and the hub can't be reached; check the path, or the network"
        raise UnreachableError(f"{key}: got {path!r}; {fix}") from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        fix = f"check the path; as a hub id it could not be fetched ({reason})"
        raise ConfigError(Problem(key, path, allowed, fix)) from error


def _further_files(directory: Path, weights: bool) -> list[str]:
    """What else transformers will read, now that the small files are there."""
    index = directory / INDEX
    shards = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    vocabularies = () if (directory / "tokenizer.json").is_file() else tokenizers.VOCABULARIES
    return [*(sorted(shards) if weights else ()), *vocabularies]
