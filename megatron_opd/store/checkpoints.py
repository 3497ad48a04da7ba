"""The checkpoints of a run: folders that appear whole or not at all, and how many of them are kept. It knows no model.

A checkpoint is written into a folder with a leading dot, synced, and renamed: `step-NNNNNNNN` exists only when all of it does.
It holds `learner/`, which the learner writes, and `run.json`, which says where the loop stood at the same moment.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from megatron_opd.config import CheckpointConfig
from megatron_opd.errors import CheckpointError
from megatron_opd.types import RunState

_NAME = re.compile(r"step-(\d+)")
_MORE_IS_BETTER = ("agreement", "support_mass", "effective_samples")


class Checkpoints:
    """The folder of all checkpoints."""

    def __init__(self, folder: Path, settings: CheckpointConfig) -> None:
        self._folder = folder
        self._settings = settings

    def newest(self) -> tuple[Path, RunState] | None:
        """The learner's folder and the loop's state of the last checkpoint, if there is one.

        Raises:
            CheckpointError: its `run.json` does not say what it should.
        """
        steps = self._steps()
        if not steps:
            return None
        folder = steps[max(steps)]
        return folder / "learner", _state(folder)

    def size(self) -> int:
        """Bytes of the last checkpoint, 0 if there is none."""
        steps = self._steps()
        return sum(file.stat().st_size for file in steps[max(steps)].rglob("*") if file.is_file()) if steps else 0

    def begin(self, version: int) -> Path:
        """An empty folder for the learner's part. A disk that had no room for it may be tried again."""
        folder = self._partial(version) / "learner"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear(self) -> None:
        """Removes what was begun and not committed, by an earlier process for one."""
        for left in self._folder.glob(".step-*"):
            shutil.rmtree(left)

    def describe(self, state: RunState) -> None:
        """Puts the loop's state beside the learner's part. A disk that had no room for it may be tried again."""
        (self._partial(state.version) / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1))

    def commit(self, version: int) -> None:
        """Makes a checkpoint whose two parts are on disk visible, and removes those that are not to be kept.

        A disk that had no room for it may be tried again.
        """
        partial, target = self._partial(version), self._folder / f"step-{version:08}"
        if partial.exists():
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            self._remove(target)
            partial.rename(target)
        _sync(self._folder)
        for folder in [*self._superfluous()]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """At once for all who look: a kill amid it leaves no half of a checkpoint under its name."""
        if folder.exists():
            hidden = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
            shutil.rmtree(hidden)

    def _steps(self) -> dict[int, Path]:
        found = {folder: _NAME.fullmatch(folder.name) for folder in self._folder.glob("step-*")}
        return {int(name[1]): folder for folder, name in found.items() if name}

    def _superfluous(self) -> Iterator[Path]:
        steps, keep_every = self._steps(), self._settings.keep_every
        best = sorted(steps, key=lambda step: (self._score(steps[step]), step))[: self._settings.keep_best]
        for step in sorted(steps)[: -self._settings.keep]:
            if step not in best and (not keep_every or step % keep_every):
                yield steps[step]

    def _score(self, folder: Path) -> float:
        """The lower the better."""
        by = self._settings.best_by
        score = _state(folder).metrics.get(by) if self._settings.keep_best else None
        if score is None:
            return math.inf
        return -score if by in _MORE_IS_BETTER else score

    def _partial(self, version: int) -> Path:
        return self._folder / f".step-{version:08}.{os.getpid()}"


def _state(folder: Path) -> RunState:
    try:
        return msgspec.json.decode((folder / "run.json").read_bytes(), type=RunState)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{folder / 'run.json'} does not load: {error}; remove {folder} to go on from an earlier one") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
