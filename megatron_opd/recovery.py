"""What a run would lose if it died now, and what it goes on from. It knows files and counts, and asks nobody anything.

Three things stand in the run directory: checkpoints (learner and loop at one moment), the journal (rollouts and scores since
then) and `quarantine.jsonl` (prompts that were set aside, and what came of them).
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from megatron_opd.config import Config, fixed
from megatron_opd.errors import CheckpointError, ConfigError, GuardError
from megatron_opd.runtime import report
from megatron_opd.runtime.whole import append
from megatron_opd.store.checkpoints import Checkpoints
from megatron_opd.store.journal import Journal, Paid
from megatron_opd.types import GuardState, Prompt, Rollout, RunState, SetAside, StepReport, TeacherScores

_LOG = logging.getLogger(__name__)
_POLL_S = 1.0
_EXPORT_TIMES_STUDENT = 2  # a float32 learner's of a bfloat16 student
_TIMES_STUDENT = 7  # bytes per parameter: 14 for weights, masters and moments, beside 2 of a bfloat16 student's file
T = TypeVar("T")


class Recovery:
    """The run directory as a memory."""

    def __init__(self, config: Config, folder: Path, *, hurried: Callable[[], bool] = lambda: False) -> None:
        """Reads what an earlier process of this run has left; there may be nothing. Once `hurried`, nothing waits for room on the disk.

        Raises:
            ConfigError: it was left by a run with other settings.
            CheckpointError: the last checkpoint is damaged.
        """
        self._settings = config.checkpoint
        self._most_set_aside = config.guard.set_aside
        self._disk_wait_s = config.supervision.disk_wait_s
        self._folder = folder
        self._student = config.student.path
        self._steps = config.loop.steps
        self._checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
        self.digest = digest(config)
        self.before = beginning(self.digest)
        self.learner_folder: Path | None = None
        if (found := self._checkpoints.newest()) is not None:
            self.learner_folder, self.before = found
        if self.before.settings != self.digest:
            raise ConfigError(f"{folder} holds a run with other settings or prompts; see its config.yaml")
        self._hurried = hurried
        on = config.checkpoint.journal != "off"
        each = config.checkpoint.journal == "record"
        self._journal = Journal(folder / "journal", batch=config.loop.batch, settings=self.digest, each_record=each) if on else None
        if self._journal is not None:
            self._journal.forget(self.before.version)
        self._left = set(self._journal.steps()) if self._journal is not None else set()  # by an earlier process, and not read yet
        self._read: dict[int, Paid] = {}
        self._reading = asyncio.Lock()
        self._quarantine = folder / "quarantine.jsonl"
        self._set_aside = _indices(self._quarantine)

    @property
    def set_aside_prompts(self) -> int:
        """How many are in quarantine."""
        return len(self._set_aside)

    def due(self, version: int) -> bool:
        """Whether a checkpoint is to be made of this version."""
        every = self._settings.every_steps
        return version == self._steps or (every > 0 and version % every == 0)

    def metrics(self, report: StepReport) -> dict[str, float | None]:
        """What a checkpoint behind this step is to be judged by.

        Raises:
            ConfigError: `checkpoint.best_by` is not among it.
        """
        found: dict[str, float | None] = {"loss": report.loss, **report.diagnostics}
        wanted = self._settings.best_by
        if self._settings.keep_best and wanted not in found:
            raise ConfigError(f"checkpoint.best_by={wanted} is nothing that a step of this run reports; use one of {', '.join(found)}")
        return found

    def newest(self) -> tuple[Path | None, int]:
        """The learner's folder of the last checkpoint, and its version; none is the beginning."""
        found = self._checkpoints.newest()
        return (found[0], found[1].version) if found is not None else (None, 0)

    async def paid(self, step: int) -> Paid:
        """What an earlier process has left of a step; whoever uses some of it takes it out. Read when the step is: it may be much."""
        async with self._reading:
            if step in self._left and self._journal is not None:
                self._left.remove(step)
                self._read[step] = await asyncio.to_thread(self._journal.read, step)
        return self._read.get(step) or Paid()

    async def past(self, version: int) -> Paid:
        """What was paid for of a step that was trained before."""
        assert self._journal is not None, "without a journal no learner is replaced"
        return await asyncio.to_thread(self._journal.read, version)

    async def keep(self, record: Rollout | TeacherScores) -> None:
        """Puts down what was paid for."""
        if self._journal is not None:
            await self.when_there_is_room(lambda: self._journal.add(record))

    async def set_aside(self, prompt: Prompt, response: Rollout | None, reason: str) -> None:
        """Puts a prompt into quarantine, with the response if there is one.

        Raises:
            GuardError: there are more than `guard.set_aside` in it.
        """
        aside = SetAside(index=prompt.index, reason=reason)
        response_ids = response.response_ids.tolist() if response is not None else None
        words = asdict(aside) | {"prompt_ids": prompt.token_ids.tolist(), "response_ids": response_ids}
        await self.when_there_is_room(lambda: _append(self._quarantine, json.dumps(words).encode() + b"\n"))
        if self._journal is not None:
            await self.when_there_is_room(lambda: self._journal.add(aside))
        self._set_aside.add(prompt.index)
        _LOG.warning("prompt %d is set aside: %s", prompt.index, reason)
        if len(self._set_aside) > self._most_set_aside:
            raise GuardError(
                f"prompt {prompt.index}: {reason}; with it {len(self._set_aside)} prompts are set aside, more than "
                f"guard.set_aside={self._most_set_aside}; see {self._quarantine}"
            )

    async def settle(self, version: int) -> None:
        """Makes the journal of a step that is about to be trained survive the machine, where that is asked for."""
        if self._journal is not None and self._settings.journal == "step":
            journal = self._journal
            await self.when_there_is_room(lambda: journal.sync(version), aside=True)

    async def begin(self, version: int) -> Path:
        """The folder that the learner is to write into, once the disk has room for it."""
        self._checkpoints.clear()
        needed_bytes = self._checkpoints.size() or _TIMES_STUDENT * _size(Path(self._student))

        def begin() -> Path:
            self._require_room(needed_bytes, "a checkpoint")
            return self._checkpoints.begin(version)

        return await self.when_there_is_room(begin)

    async def room_for_export(self) -> None:
        """Waits until the disk has room for the student as a Hugging Face folder."""
        needed_bytes = _EXPORT_TIMES_STUDENT * _size(Path(self._student))
        await self.when_there_is_room(lambda: self._require_room(needed_bytes, "an export of the student"))

    async def commit(self, state: RunState) -> None:
        """Makes the checkpoint whole, and drops from the journal what it has made superfluous."""
        await self.when_there_is_room(lambda: self._checkpoints.describe(state))
        await self.when_there_is_room(lambda: self._checkpoints.commit(state.version), aside=True)
        if self._journal is not None:
            self._journal.forget(state.version)

    async def when_there_is_room(self, write: Callable[[], T], *, aside: bool = False) -> T:
        """What `write` returns, called in a thread if `aside`. A full disk makes the run wait, which its user is told, until there is room.

        Raises:
            OSError: there was none within `supervision.disk_wait_s` or until the run was asked to stop, or it is another error.
        """
        deadline, told = time.monotonic() + self._disk_wait_s, False
        while True:
            try:
                return await asyncio.to_thread(write) if aside else write()
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not full or time.monotonic() > deadline or self._hurried():
                    raise
                if not told:
                    _LOG.warning(words := f"the run waits for room on the disk of {self._folder}: {error}")
                    report.notify(words)
                    told = True
            await asyncio.sleep(_POLL_S)

    def _require_room(self, needed_bytes: int, what: str) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < needed_bytes:
            raise OSError(errno.ENOSPC, f"{what} needs {needed_bytes >> 20} MiB, {free >> 20} MiB are free", str(self._folder))

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()


def rewind(config: Config, folder: Path) -> int:
    """Takes metrics.jsonl back to the last checkpoint, whose version it returns: what came behind it is done again.

    Raises:
        CheckpointError: that checkpoint is damaged.
    """
    found = Checkpoints(folder / "checkpoints", config.checkpoint).newest()
    version, size = (found[1].version, found[1].metrics_bytes) if found is not None else (0, 0)
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        os.truncate(metrics, min(size, metrics.stat().st_size))
    return version


def digest(config: Config) -> str:
    """Of the settings that must not change while a run lasts, and of its prompts."""
    words = hashlib.blake2b(json.dumps(fixed(config), sort_keys=True).encode(), digest_size=16)
    with Path(config.data.prompts).open("rb") as file:
        words.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return words.hexdigest()


def beginning(settings: str) -> RunState:
    """Where a run stands before its first step."""
    return RunState(
        version=0,
        prompts=0,
        metrics_bytes=0,
        settings=settings,
        tokens=0,
        wall_seconds=0.0,
        lag_histogram={},
        seconds_by_stage={},
        busy_seconds={},
        guard=GuardState(),
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _append(file: Path, line: bytes) -> None:
    with file.open("ab", buffering=0) as opened:
        append(opened, line)


def _indices(quarantine: Path) -> set[int]:
    """Of the prompts in quarantine; a line that a crash cut short is removed.

    Raises:
        CheckpointError: another line is damaged.
    """
    if not quarantine.exists():
        return set()
    data = quarantine.read_bytes()
    os.truncate(quarantine, data.rfind(b"\n") + 1)
    try:
        return {json.loads(line)["index"] for line in data[: data.rfind(b"\n") + 1].splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{quarantine} is damaged: {type(error).__name__}: {error}; remove the line, or the file") from error
