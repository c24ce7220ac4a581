"""Names that a recipe chooses from, where more than one file needs them."""

from __future__ import annotations

COSINE_TO_TENTH = "cosine_to_tenth"  # the project's own schedule, after a linear warm-up
SCHEDULES = (COSINE_TO_TENTH, "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
TRACKERS = ("wandb", "mlflow")  # beside TensorBoard; each is an extra
