"""What has been paid for and is not yet in a checkpoint, on disk: rollouts, teacher scores, prompts set aside. It knows no policy.

One file per optimizer step holds the records of that step's prompts, so that a checkpoint makes whole files superfluous and
nothing is ever rewritten. A record is its length, its kind, its body as it travels on the wire, and a BLAKE2b digest of all
that. Reading ends at the first record that is torn or damaged: what stood behind it is paid for again.
"""

import hashlib
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_opd.errors import ConfigError, WireError
from megatron_opd.runtime import whole, wire
from megatron_opd.store.pieces import joined
from megatron_opd.types import Rollout, SetAside, TeacherScores

FILES = "step-*.bin"  # the records of a step each
_LOG = logging.getLogger(__name__)
_HEAD = struct.Struct("<IB")  # bytes of the body, bytes of the kind's name
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """What a journal still knows, by prompt index."""

    rollouts: dict[int, Rollout] = field(default_factory=dict)
    begun: dict[int, Rollout] = field(default_factory=dict)  # unfinished
    scores: dict[int, TeacherScores] = field(default_factory=dict)
    set_aside: dict[int, SetAside] = field(default_factory=dict)


class Journal:
    """Append-only files in a folder. A record survives the process once `add` returns, and the machine once `sync` does."""

    def __init__(self, folder: Path, *, batch: int, settings: str = "", each_record: bool = False) -> None:
        """`batch` prompts make a step; `settings` is the digest of what must not change; with `each_record`, `add` syncs.

        Raises:
            ConfigError: the folder was filled under other settings.
        """
        self._folder = folder
        self._batch = batch
        self._each_record = each_record
        self._files: dict[int, BinaryIO] = {}
        folder.mkdir(exist_ok=True)
        if settings:
            self._require(settings)

    def steps(self) -> list[int]:
        """Those that it holds records of."""
        return sorted(map(_step, self._folder.glob(FILES)))

    def read(self, *steps: int) -> Paid:
        """All whole records of steps to which nothing is being added; each file is cut behind its last one."""
        paid = Paid()
        for file in filter(Path.exists, map(self._path, steps)):
            for record in self._whole(file):
                if isinstance(record, Rollout | TeacherScores | SetAside) and record.index // self._batch + 1 == _step(file):
                    _put(paid, record)
        return paid

    def add(self, record: Rollout | TeacherScores | SetAside) -> None:
        """Appends.

        Raises:
            OSError: the disk is full or broken; nothing of the record is left, and the call may be repeated.
        """
        whole.append(self._file(record.index // self._batch + 1), frame(record), sync=self._each_record)

    def sync(self, step: int) -> None:
        """Returns once the records of a step, those of an earlier process too, would survive the machine."""
        if self._path(step).exists():
            os.fsync(self._file(step).fileno())

    def forget(self, version: int) -> None:
        """Removes the records of all steps up to `version`: a checkpoint holds what became of them."""
        for file in self._folder.glob(FILES):
            if _step(file) <= version:
                if (opened := self._files.pop(_step(file), None)) is not None:
                    opened.close()
                file.unlink()

    def _require(self, settings: str) -> None:
        mark = self._folder / "settings"
        before = mark.read_text() if mark.exists() else ""
        if self.steps() and before not in ("", settings):
            raise ConfigError(f"{self._folder} was filled under other settings or prompts; set back what changed, or name a new run.dir")
        if before != settings:
            whole.write(mark, settings.encode())

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, step: int) -> BinaryIO:
        if step not in self._files:
            self._files[step] = self._path(step).open("ab", buffering=0)
        return self._files[step]

    def _path(self, step: int) -> Path:
        return self._folder / file_of(step)

    def _whole(self, file: Path) -> Iterator[Any]:
        data = file.read_bytes()
        found = list(records(data))
        yield from (record for _, record in found)
        end = found[-1][0] if found else 0
        if end < len(data):
            _LOG.warning("%s: its last %d bytes are torn or damaged and are left out", file, len(data) - end)
            os.truncate(file, end)


def _put(paid: Paid, record: Rollout | TeacherScores | SetAside) -> None:
    match record:
        case TeacherScores():
            paid.scores[record.index] = record
        case SetAside():
            paid.set_aside[record.index] = record
        case Rollout():
            response = joined(paid.begun.pop(record.index, None), record)
            if response is not None:  # else its beginning stood in what was damaged
                (paid.begun if response.finish_reason == "unfinished" else paid.rollouts)[record.index] = response


def frame(record: object) -> bytes:
    """A record as it stands in the file."""
    name, body = wire.encode(record)
    words = _HEAD.pack(len(body), len(name)) + name + body
    return words + _digest(words)


def records(data: bytes) -> Iterator[tuple[int, Any]]:
    """(where it ends, record) of each whole record up to the first that is not."""
    start = 0
    while start + _HEAD.size <= len(data):
        body_bytes, name_bytes = _HEAD.unpack_from(data, start)
        middle = start + _HEAD.size + name_bytes
        end = middle + body_bytes
        if data[end : end + _DIGEST_BYTES] != _digest(data[start:end]):
            return
        try:
            record = wire.decode(data[start + _HEAD.size : middle], data[middle:end])
        except WireError:
            return  # written whole, but by another version of this package
        start = end + _DIGEST_BYTES
        yield start, record


def _digest(words: bytes) -> bytes:
    return hashlib.blake2b(words, digest_size=_DIGEST_BYTES).digest()


def file_of(step: int) -> str:
    """The name of the file with the records of a step."""
    return f"step-{step:08}.bin"


def _step(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))
