"""Token ids of rows, computed once: for every use of a row in a process, and by the process that starts the ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import Example, encode
from alignx_ds.data.rows import Row

VARIABLE = "ALIGNX_ENCODINGS"  # the file that the process which starts the ranks leaves for them
KEY_BYTES = 16
Key = bytes  # a hash of all that the token ids of a row depend on


class Encodings:
    """What `encode` returns for the rows of a run, with this tokenizer; of equal rows it is computed once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        written = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template}" if tokenizer.is_fast else ""
        self._salt = hashlib.sha256(written.encode()).digest()
        path = os.environ.get(VARIABLE, "")
        self._known = _read(Path(path)) if written and os.path.isfile(path) else {}

    def encode(self, rows: list[Row], system: str | None = None, *, every_answer: bool = False) -> list[Example]:
        """As `encode` of data/encode.py."""
        keys = [self._key(row, system, every_answer=every_answer) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        made = encode(list(new.values()), self.tokenizer, system, every_answer=every_answer)
        self._known |= zip(new, made, strict=True)
        found = (self._known[key] for key in keys)
        return [Example(e.ids, e.prompt_length, row.place, e.earlier) for e, row in zip(found, rows, strict=True)]

    def _key(self, row: Row, system: str | None, *, every_answer: bool) -> Key:
        turns = [(turn.role, turn.text, turn.learned) for turn in row.chat]
        written = repr((turns, row.response, system, every_answer and bool(row.before)))
        return hashlib.blake2b(written.encode(errors="surrogatepass"), digest_size=KEY_BYTES, key=self._salt).digest()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it, the processes that this one starts find what it has encoded, memory-mapped."""
        with TemporaryDirectory(prefix="alignx-encodings-") as directory:
            path = Path(directory) / "encodings.safetensors"
            save_file(_tensors(self._known), path)
            os.environ[VARIABLE] = str(path)
            try:
                yield
            finally:
                del os.environ[VARIABLE]


def _tensors(known: dict[Key, Example]) -> dict[str, NDArray[np.generic]]:
    examples = list(known.values())
    ids, ends = _flat([example.ids for example in examples])
    earlier, earlier_ends = _flat([tuple(n for span in example.earlier for n in span) for example in examples])
    return {
        "keys": np.frombuffer(b"".join(known), dtype=np.uint8),
        "ids": ids,
        "ends": ends,
        "prompts": np.array([example.prompt_length for example in examples], dtype=np.int64),
        "earlier": earlier,
        "earlier_ends": earlier_ends,
    }


def _flat(parts: list[tuple[int, ...]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All numbers in a row, and where each part ends."""
    numbers = np.fromiter((n for part in parts for n in part), dtype=np.int32)
    return numbers, np.cumsum([len(part) for part in parts], dtype=np.int64)


def _read(path: Path) -> dict[Key, Example]:
    found = load_file(path)
    keys = found["keys"].tobytes()
    places = (("ids", "ends"), ("earlier", "earlier_ends"))
    ids, earlier = (np.split(found[name], found[ends][:-1]) for name, ends in places)
    known = {}
    for number, prompt in enumerate(found["prompts"].tolist()):
        pairs = earlier[number].reshape(-1, 2).tolist()
        key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
        known[key] = Example(tuple(ids[number].tolist()), prompt, earlier=tuple((a, b) for a, b in pairs))
    return known
