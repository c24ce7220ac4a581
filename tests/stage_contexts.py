"""What training stages work on in tests: a config, a base model and only those rows that the stage under test needs."""

from __future__ import annotations

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.inputs import EncodedData
from alignx_ds.data.splits import DataSplits
from alignx_ds.models.base import BaseModel
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages.stage import StageContext
from alignx_ds.training.metrics import no_log

NO_EXAMPLES = LabelledExamples([], [])


def stage_context(
    config: RunConfig,
    out: Outputs,
    train: LabelledExamples = NO_EXAMPLES,
    calibration: LabelledExamples = NO_EXAMPLES,
    injected: dict[str, list[Example]] | None = None,
) -> StageContext:
    """No curves are written."""
    data = EncodedData(
        splits=DataSplits({}, {}, {}, frozenset()),
        injected=injected or {},
        train=train,
        calibration_rows=calibration,
        held_out={},
        references=NO_EXAMPLES,
        routed=NO_EXAMPLES,
    )
    return StageContext(config, BaseModel(config.model), data, out, logger=lambda directory: no_log)
