"""What every training stage of a run shares: its config, base model and rows, and where its files go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignx_ds.config.parse import to_yaml
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.inputs import EncodedData
from alignx_ds.models.base import BaseModel
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed
from alignx_ds.training.keeper import Keeper, Keeping, Scribe, no_scribe


@dataclass(frozen=True)
class StageContext:
    config: RunConfig
    base: BaseModel
    data: EncodedData
    out: Outputs

    def keeper(self, name: str, inputs: dict[str, Any]) -> Keeper:
        """Of a training job with these inputs."""
        c = self.config
        keeping = Keeping(self.out.checkpoints, self.out.nonfinite, c.checkpoints, c.nonfinite, to_yaml(c), c.seed)
        return Keeper(name, inputs, keeping, self._scribe(name), self._text)

    def _text(self, ids: Any) -> str:
        text: str = self.base.tokenizer.decode(ids)
        return text

    def _scribe(self, name: str) -> Scribe:
        """Writes a training curve to TensorBoard, on rank 0."""
        if not distributed.is_main():
            return no_scribe
        return _tensorboard(lambda step: self._writer(name, step))

    def _writer(self, name: str, step: int) -> Any:
        """What a job that resumes wrote after its checkpoint is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.out.tensorboard / name), purge_step=step)


def _tensorboard(start: Callable[[int], Any]) -> Scribe:
    writers: list[Any] = []

    def write(step: int, values: dict[str, float]) -> None:
        if not writers:
            writers.append(start(step))
        for key, value in values.items():
            writers[0].add_scalar(key, value, step)
        writers[0].flush()

    return write
