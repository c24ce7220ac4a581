"""Settings of what is measured while a job trains."""

from __future__ import annotations

from dataclasses import dataclass

from alignx_ds.mocae.bounds import NonNegativeInt, PositiveInt


@dataclass
class EvaluateConfig:
    """The loss on rows of the calibration split while stage 1 trains. Stage 1 then trains on none of that split."""

    every: NonNegativeInt = 0  # optimizer steps between two evaluations, and one after the last step; 0: none
    rows: PositiveInt = 256  # of an axis's calibration split, at most
    patience: NonNegativeInt = 0  # evaluations in a row without a lower loss, after which the job ends; 0: never
    keep_best: bool = True  # the result has the weights with the lowest evaluation loss, not those of the last step
