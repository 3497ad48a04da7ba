"""Runs all roles of a job on this machine and watches them: the first to die ends the run, and nobody outlives it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from megatron_opd import placement
from megatron_opd.config import Config, to_yaml
from megatron_opd.errors import ConfigError, HungUpError, OPDError
from megatron_opd.placement import Process
from megatron_opd.runtime.environment import environment
from megatron_opd.runtime.rpc import make_keys

LAUNCHER = "MEGATRON_OPD_LAUNCHER"  # its process id: a role that finds itself without this parent must not start
REPORT_FD = "MEGATRON_OPD_REPORT_FD"  # where a role writes the error it dies of; a pipe, so that a full disk hides nothing
_DISTANCE = {RuntimeError.__name__: 2, HungUpError.__name__: 3}  # what a rank raises when a neighbour died, a role when the controller did
_GRACE_S = 10.0  # for the others to end after the controller has
_TERMINATE_S = 3.0  # between SIGTERM and SIGKILL


class RoleDied(OPDError):
    """A role ended before its time; the message is its own last error where it left one."""

    def __init__(self, message: str, *, distance: int = 5, time_s: float = 0.0) -> None:
        super().__init__(message)
        self.distance = distance  # from the root of what went wrong; of several deaths the least is the cause
        self.time_s = time_s  # since the epoch, where it is known


@dataclass(slots=True)
class Child:
    """A started role process."""

    process: Process
    popen: subprocess.Popen
    log: Path
    report: IO[bytes]  # read end of its error pipe


def prepare(config: Config, processes: tuple[Process, ...]) -> Path:
    """Makes the run directory with resolved config, placement and keys.

    Raises:
        ConfigError: it already holds a run, or cannot be written.
    """
    folder = Path(config.run.dir)
    _clear_failed_start(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"run.dir={folder} is not empty; name a new directory, or remove the old run")
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        make_keys(folder / "keys")
        (folder / "config.yaml").write_text(to_yaml(config))
        placement.save(processes, folder)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error}") from error
    return folder


def _clear_failed_start(folder: Path) -> None:
    """Removes what a run left that ended before its first step; a directory with anything else in it stays as it is."""
    made = {"config.yaml", "controller.json", "keys", "logs", "metrics.jsonl", "placement.json", "rendezvous", "tensorboard"}
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    steps = folder / "metrics.jsonl"
    if "config.yaml" in found and found <= made and not (steps.exists() and steps.stat().st_size):
        shutil.rmtree(folder)


class Children:
    """The processes of a run. Leaving the context ends all of them, whatever happened."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._config = config
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._signal_groups(signal.SIGTERM)
        deadline = time.monotonic() + _TERMINATE_S
        while time.monotonic() < deadline and any(child.popen.poll() is None for child in self._children):
            time.sleep(0.02)
        self._signal_groups(signal.SIGKILL)
        for child in self._children:
            child.popen.wait()
            child.report.close()

    def start(self, process: Process) -> None:
        """Starts one role in a session of its own, its output in `logs/`."""
        command = [
            sys.executable,
            "-m",
            "megatron_opd",
            "role",
            process.role,
            str(self._folder / "config.yaml"),
            "--index",
            str(process.index),
            "--host",
            self._config.run.host,
        ]
        log = self._folder / "logs" / f"{process.name}.log"
        reading, writing = os.pipe()
        run = self._config.run
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **environment(run.device, run.host),
                    **_devices(process),
                    REPORT_FD: str(writing),
                    LAUNCHER: str(os.getpid()),
                },
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        os.set_blocking(reading, False)
        self._children.append(Child(process=process, popen=popen, log=log, report=os.fdopen(reading, "rb")))

    def watch(self, leader: str, show: Callable[[], None], *, timeout_s: float = math.inf) -> None:
        """Returns when the leader has ended well and all others after it; meanwhile calls `show` many times a second.

        Raises:
            RoleDied: any role failed or was killed, or the leader took longer than `timeout_s`.
        """
        limit = time.monotonic() + timeout_s
        while any(child.popen.poll() is None for child in self._children if child.process.role == leader):
            self._raise_if_any_failed()
            if time.monotonic() > limit:
                raise RoleDied(f"{leader} did not end within {timeout_s:g} s; see {self._folder / 'logs'}")
            show()
            time.sleep(0.05)
        deadline = time.monotonic() + _GRACE_S
        while late := [child.process.name for child in self._children if child.popen.poll() is None]:
            self._raise_if_any_failed()
            if time.monotonic() > deadline:
                raise RoleDied(f"{', '.join(late)} did not end within {_GRACE_S:g} s of the {leader}; see {self._folder / 'logs'}")
            time.sleep(0.02)
        self._raise_if_any_failed()
        show()

    def _raise_if_any_failed(self) -> None:
        if all(child.popen.poll() in (None, 0) for child in self._children):
            return
        time.sleep(1.0)  # the cause and those it took with it die within moments: let all of them speak
        failed = [child for child in self._children if child.popen.poll() not in (None, 0)]
        distance, time_s, message = min(_cause(child) for child in failed)
        raise RoleDied(message, distance=distance, time_s=time_s)

    def forward(self, number: signal.Signals) -> None:
        """Sends a signal to the processes that were started, not to those that they have started themselves."""
        for child in self._children:
            if child.popen.poll() is None:
                child.popen.send_signal(number)

    def _signal_groups(self, number: signal.Signals) -> None:
        for child in self._children:
            try:
                os.killpg(child.popen.pid, number)
            except ProcessLookupError:
                continue


def _devices(process: Process) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, process.devices))} if process.devices else {}


def _cause(child: Child) -> tuple[int, float, str]:
    """How far from the root this death is, when it happened, and what to tell the user: the least of all is the cause."""
    code = child.popen.returncode
    reports = (child.report.read() or b"").splitlines()
    if reports:
        first = json.loads(reports[0])
        return _DISTANCE.get(first["kind"], 1), first["time"], f"{child.process.name}: {first['message']} (log: {child.log})"
    if code < 0:
        return 0, 0.0, f"{child.process.name} was killed by {signal.Signals(-code).name} (log: {child.log})"
    return 4, 0.0, f"{child.process.name} ended with exit code {code} (log: {child.log})"


def report_death(error: BaseException) -> None:
    """Called by a dying role: tells the launcher why, if there is one."""
    descriptor = os.environ.get(REPORT_FD)
    if descriptor is not None:
        message = str(error) if isinstance(error, OPDError) else f"{type(error).__name__}: {error}"
        line = json.dumps({"kind": type(error).__name__, "time": time.time(), "message": message[:4000]})
        os.write(int(descriptor), line.encode() + b"\n")
