"""Sequential and mixed fine-tuning: stage 1's own job, with another start or with all axes' rows at once."""

from __future__ import annotations

from alignx_ds.stages.finetune import Job

MIXED = "mixed"


def sequential_name(axes: list[str]) -> str:
    """The directory of the last fine-tune of the sequence; with one axis that is its specialist."""
    return axes[0] if len(axes) == 1 else f"sequential_{len(axes)}_{axes[-1]}"


def baseline_jobs(axes: list[str]) -> list[Job]:
    """One axis after another, starting from the first axis's specialist; and all axes' rows, shuffled."""
    jobs = []
    for count in range(2, len(axes) + 1):
        seen = axes[:count]
        jobs.append(Job(sequential_name(seen), (seen[-1],), start=sequential_name(seen[:-1])))
    return [*jobs, Job(MIXED, tuple(axes))]
