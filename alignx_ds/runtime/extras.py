"""The packages that loading an aligned model and `alignx-ds generate` do not need, by the extra that installs them."""

from __future__ import annotations

EXTRAS: dict[str, tuple[str, ...]] = {  # import names; pyproject.toml has the packages
    "train": (
        *("deepspeed", "ninja", "mpi4py", "accelerate", "tensorboard", "datasets", "pyarrow"),
        *("sklearn", "scipy", "matplotlib"),
    ),
    "judge": ("openai", "sentencepiece"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "serve": ("starlette", "uvicorn", "prometheus_client", "pydantic"),
}


def missing_package(error: BaseException) -> str | None:
    """One line with the package that an import lacks and the command that installs it; None for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return extra and f"the package {name} is not installed; pip install 'alignx-ds[{extra}]'"
