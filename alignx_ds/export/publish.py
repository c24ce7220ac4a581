"""`alignx-ds export … --push OWNER/NAME`: the export as a model repository of the hub, with the user's own login.

`alignx-ds export push OUT OWNER/NAME` does the same with an export that is there already.

The token is the one of `hf auth login` or of HF_TOKEN. Only the hub's client reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import enable_progress_bars, validate_repo_id  # type: ignore[attr-defined]

from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.runtime import console

KEY = "--push"
UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class Repository:
    """Where an export goes. `dry_run`: only show what would be sent, without the network."""

    name: str
    public: bool
    dry_run: bool

    @property
    def visibility(self) -> str:
        return "public" if self.public else "private"

    def check(self) -> None:
        """Before the export is made. Raises ConfigError where it could not be pushed, as far as that can be known."""
        hub_name(KEY, self.name)
        if self.dry_run:
            return
        if get_token() is None:
            fix = "run `hf auth login`, or export HF_TOKEN with a token that may write"
            raise ConfigError(Problem(KEY, self.name, "a login at the hub", fix))
        try:
            with _asking():
                token = HfApi().whoami().get("auth", {}).get("accessToken", {})
                there = "private" if HfApi().repo_info(self.name).private else "public"
        except RepositoryNotFoundError:  # then it is made
            there = self.visibility
        except OSError as error:
            fix = f"the hub refuses or can't be reached ({error}); nothing was written"
            raise ConfigError(Problem(KEY, self.name, "a repository that can be written", fix)) from error
        if token.get("role") == "read":
            fix = "this token may only read; make one that may write, and log in with it"
            raise ConfigError(Problem(KEY, self.name, "a login that may write", fix))
        if there != self.visibility:
            fix = (
                f"it exists and is {there}; {'leave --public out' if self.public else 'give --public'}, or another name"
            )
            raise ConfigError(Problem(KEY, self.name, f"a {self.visibility} repository", fix))

    def push(self, directory: Path) -> None:
        """Send the files; the repository then holds these and no others. Raises DataError; the export stays."""
        files = {str(path.relative_to(directory)): path.stat().st_size for path in _files(directory)}
        again = f"alignx-ds export push {directory} {self.name}{' --public' if self.public else ''}"
        place = f"{constants.ENDPOINT}/{self.name} ({self.visibility})"
        total = f"{len(files)} files, {size(sum(files.values()))}"
        if self.dry_run:
            console.say(f"would be pushed to {place}: {total}")
            for name, count in files.items():
                console.say(f"  {size(count):>9}  {name}")
            console.say(f"push it with `{again}`")
            return
        if sys.stderr.isatty():
            enable_progress_bars()
        try:
            with _asking():
                HfApi().create_repo(self.name, private=not self.public, exist_ok=True)
                message = "Export of an aligned model by alignx-ds"
                HfApi().upload_folder(
                    repo_id=self.name, folder_path=directory, commit_message=message, delete_patterns="*"
                )
        except OSError as error:
            raise DataError(f"{directory} is written, but not pushed ({error}); push it with `{again}`") from error
        console.say(f"pushed to {place}: {total}")


def push(directory: Path, target: Repository) -> None:
    """Send an export that was made before. Raises ConfigError and DataError."""
    if not (directory / "README.md").is_file():
        fix = "it has no README.md; give the directory that `alignx-ds export` has written"
        raise ConfigError(Problem("OUT", str(directory), "an export with its model card", fix))
    target.check()
    target.push(directory)


def hub_name(key: str, given: str) -> None:
    """Raises ConfigError where this is no OWNER/NAME of the hub."""
    try:
        validate_repo_id(given)
        fix = "write both, as in my-name/world-aligned" if given.count("/") != 1 else ""
    except HFValidationError as error:
        fix = str(error).splitlines()[0]
    if fix:
        raise ConfigError(Problem(key, given, "OWNER/NAME of a model on the hub", fix))


@contextmanager
def _asking() -> Iterator[None]:
    """What the client raises becomes an OSError in one line, but for a repository that is not there."""
    try:
        yield
    except RepositoryNotFoundError:
        raise
    except Exception as error:  # of the client, and of the transport below it, which its versions exchange
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise OSError("; ".join([type(error).__name__, *lines])) from error


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size(count: int) -> str:
    """In the unit in which it has a digit before the point: 1.2 MB."""
    return next((f"{count / unit:.1f} {name}" for unit, name in UNITS if count >= unit), f"{count} B")
