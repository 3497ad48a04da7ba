"""Runs all roles of a job on this machine and watches them: who dies is replaced or ends the run, and nobody outlives it."""

import fcntl
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

from megatron_opd import placement
from megatron_opd.config import CheckpointConfig, Config, fixed, load, to_yaml
from megatron_opd.errors import ConfigError, HungUpError, OPDError
from megatron_opd.placement import Process
from megatron_opd.recovery import rewind
from megatron_opd.runtime import whole
from megatron_opd.runtime.environment import environment
from megatron_opd.runtime.report import NOTICE, READY, REPLACE, REPORT_FD
from megatron_opd.runtime.rpc import make_keys
from megatron_opd.store.journal import FILES

_LOG = logging.getLogger(__name__)
LAUNCHER = "MEGATRON_OPD_LAUNCHER"  # its process id: a role that finds itself without this parent must not start
SLURM_JOB_END_TIME = "SLURM_JOB_END_TIME"  # seconds since the epoch
STOPPED = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL
_DISTANCE = {RuntimeError.__name__: 2, HungUpError.__name__: 3}  # what a rank raises when a neighbour died, a role when the controller did
_SOUND_S = 600.0  # who ran for so long has all its restarts again
_GRACE_S = 60.0  # for the others to end after the controller has, on cores that may have other work
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
    report: IO[bytes]  # read end of its pipe
    replacement: bool  # started in the place of one that died
    started_s: float = field(default_factory=time.monotonic)
    ready: bool = False
    reports: list[dict[str, Any]] = field(default_factory=list)  # deaths that came out of the pipe

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than it should."""
        return self.popen.poll() not in (None, 0)


class StopRequest:
    """A time that comes, or SIGTERM or SIGUSR1 from now on, ask for an orderly end with a checkpoint.

    A second signal ends the run at once, as SIGINT does.
    """

    def __init__(self, at_s: float = math.inf) -> None:
        """`at_s` counts from the epoch."""
        self._at_s = at_s
        self._signalled = False
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True

    @property
    def made(self) -> bool:
        """Whether the run is to end."""
        return self._signalled or time.time() >= self._at_s

    @property
    def why(self) -> str:
        """Who made it."""
        return "as asked" if self._signalled else "before its time limit"


def ends_at(settings: CheckpointConfig) -> float:
    """When a run that starts now is to save and end, in seconds since the epoch: before its own limit, or that of the job around it."""
    if settings.time_limit_s:
        return time.time() + settings.time_limit_s - settings.before_limit_s
    return float(os.environ.get(SLURM_JOB_END_TIME, math.inf)) - settings.before_limit_s


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other launchers out of a run directory, which it makes if there is none.

    Raises:
        ConfigError: somebody works there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error}") from error
    try:
        _lock(lock, folder)
        yield
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"run.dir={folder} is another process's at the moment; wait for its end, or name another directory") from None
    except OSError as error:
        _LOG.warning("run.dir=%s lies where directories cannot be locked (%s): nothing keeps a second launcher out", folder, error)


def prepare(config: Config, processes: tuple[Process, ...], *, resume: bool = False) -> tuple[Path, int]:
    """Makes the run directory with resolved config, placement and keys; with `resume`, goes on in the one that an earlier process left.

    A run that has made all its steps keeps its summary: only its evaluation is left to be made again.

    Returns:
        the directory, and the step behind which the run goes on.

    Raises:
        ConfigError: it already holds a run, or to resume, one with other settings; or it cannot be written.
    """
    folder = Path(config.run.dir)
    version = 0
    if resume and (folder / "config.yaml").exists():
        _require_same(folder / "config.yaml", config)
        version = rewind(config, folder)
        _clear_for_resume(folder, over=version == config.loop.steps)
    else:
        _clear_failed_start(folder)
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"run.dir={folder} is not empty; name a new directory, remove the old run, or go on with it by --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole.write(folder / "config.yaml", to_yaml(config).encode())  # first: it says that this is a run's directory
        (folder / "logs").mkdir(exist_ok=True)
        make_keys(folder / "keys")
        placement.save(processes, folder)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error}") from error
    return folder, version


def _clear_failed_start(folder: Path) -> None:
    """Removes what a run left that ended before its first step; a directory with anything else in it stays as it is."""
    made = {"config.yaml", "controller.json", "journal", "keys", "logs", "metrics.jsonl", "placement.json", "rendezvous", "tensorboard"}
    found = {entry.name.removesuffix(".partial") for entry in folder.iterdir()} if folder.is_dir() else set()
    steps = folder / "metrics.jsonl"
    paid = folder.is_dir() and any((folder / "journal").glob(FILES))
    if "config.yaml" in found and found <= made and not paid and not (steps.exists() and steps.stat().st_size):
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _clear_for_resume(folder: Path, *, over: bool) -> None:
    """Removes what belonged to the earlier process alone: its keys and addresses, and the summary of a run that is not over."""
    for name in ("keys", "rendezvous"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("controller.json", *(() if over else ("summary.json",))):
        (folder / name).unlink(missing_ok=True)


def _require_same(file: Path, config: Config) -> None:
    before, now = fixed(load(file)), fixed(config)
    changed = [f"{name}={now[name]} (was {before[name]})" for name in now if now[name] != before[name]]
    if changed:
        raise ConfigError(f"{file.parent} cannot be resumed with {', '.join(changed)}; set back what changed, or name a new run.dir")


class Children:
    """The processes of a run. Leaving the context ends all of them, whatever happened."""

    def __init__(self, folder: Path, config: Config, tell: Callable[[str], None] = print) -> None:
        """`tell` shows the user a line: who died and is replaced."""
        self._folder = folder
        self._config = config
        self._tell = tell
        self._children: list[Child] = []
        self._restarts: Counter[tuple[str, int]] = Counter()  # by role and replica
        self._due: list[tuple[float, list[Process]]] = []  # when to start whom again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _close(self._children)

    def start(self, process: Process, *, replacement: bool = False) -> None:
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
        report = os.fdopen(reading, "rb")
        self._children.append(Child(process=process, popen=popen, log=log, report=report, replacement=replacement))

    def watch(self, leader: str, show: Callable[[], None], stop: StopRequest | None = None, *, timeout_s: float = math.inf) -> None:
        """Returns when the leader has ended well and all others after it; meanwhile calls `show` many times a second.

        A request to stop is handed on to a controller, once it can hear it; any other leader has nothing to finish, and is left at once.

        Raises:
            RoleDied: a role failed or was killed that is not replaced, or the leader took longer than `timeout_s`.
        """
        limit = time.monotonic() + timeout_s
        asked = False
        while self._is_on(leader):
            self._supervise()
            if stop is not None and stop.made and not asked:
                asked = self._ask_to_stop(leader, stop.why)
            if time.monotonic() > limit:
                raise RoleDied(f"{leader} did not end within {timeout_s:g} s; see {self._folder / 'logs'}")
            show()
            time.sleep(0.05)
        replacements = [child for child in self._children if child.replacement]  # some may still be starting: nobody will greet them
        _close(replacements)
        self._children = [child for child in self._children if child not in replacements]
        deadline = time.monotonic() + _GRACE_S
        while late := [child.process.name for child in self._children if child.popen.poll() is None]:
            self._raise_if_any_failed()
            if time.monotonic() > deadline:
                raise RoleDied(f"{', '.join(late)} did not end within {_GRACE_S:g} s of the {leader}; see {self._folder / 'logs'}")
            time.sleep(0.02)
        self._raise_if_any_failed()
        show()

    def _is_on(self, leader: str) -> bool:
        """Whether it runs, or is to run again: replacements only while a controller is there to greet them."""
        greeted = (self._folder / "controller.json").exists()
        mine = [child for child in self._children if child.process.role == leader and (greeted or not child.replacement)]
        due = greeted and any(process.role == leader for _, processes in self._due for process in processes)
        return due or any(child.popen.poll() is None or child.failed for child in mine)

    def _ask_to_stop(self, leader: str, why: str) -> bool:
        """Whether the leader could be told: a controller that listens."""
        if leader != "controller":
            raise KeyboardInterrupt
        if not (self._folder / "controller.json").exists():
            return False
        self._tell(f"the run ends {why}: the step that is under way is finished first; a second signal ends it at once")
        for child in self._children:
            if child.process.role == leader and child.popen.poll() is None:
                child.popen.send_signal(signal.SIGUSR1)
        return True

    def _supervise(self) -> None:
        """Replaces what can be replaced, as often as is allowed; who dies before all had reported for the first time can not."""
        for child in self._children:
            was_ready = child.ready
            for report in _listen(child):
                self._end(report["pid"], report["message"]) if report["kind"] == REPLACE else self._tell(report["message"])
            if child.replacement and child.ready and not was_ready:
                self._tell(f"{child.process.name} is back, {time.monotonic() - child.started_s:.0f} s after it was started again")
            wait_s = self._config.run.start_timeout_s
            if child.replacement and not child.ready and time.monotonic() > child.started_s + wait_s:
                self._end(child.popen.pid, f"it was not ready within {wait_s:g} s")
        while self._due and self._due[0][0] <= time.monotonic():
            for process in self._due.pop(0)[1]:
                self.start(process, replacement=True)
        if not any(child.failed for child in self._children):
            return
        time.sleep(1.0)  # the cause and those it took with it die within moments: let all of them speak
        failed = [child for child in self._children if child.failed]
        replicas = {(child.process.role, child.process.replica) for child in failed}
        for child in failed:
            if time.monotonic() > child.started_s + _SOUND_S:
                self._restarts.pop((child.process.role, child.process.replica), None)
        begun = (self._folder / "metrics.jsonl").exists()
        spent = any(self._restarts[replica] >= self._config.restarts for replica in replicas)
        if not begun or spent or not all(map(self._is_replaceable, failed)):
            self._raise_if_any_failed()
        for role, replica in sorted(replicas):
            self._replace(role, replica)

    def _is_replaceable(self, child: Child) -> bool:
        if child.process.role == "learner":  # one that hung up says that the controller no longer answers
            return self._config.replaces_learner and _cause(child)[0] != _DISTANCE[HungUpError.__name__]
        return child.process.role in ("rollout", "teacher")

    def _replace(self, role: str, replica: int) -> None:
        """Ends what is left of a replica, and starts all of it again after a while."""
        old = [child for child in self._children if (child.process.role, child.process.replica) == (role, replica)]
        cause = min(_cause(child) for child in old if child.failed)[-1]
        self._restarts[role, replica] += 1
        number, most = self._restarts[role, replica], self._config.restarts
        self._tell(f"{cause}; it is replaced ({number} of {most} times)")
        _close(old)
        self._children = [child for child in self._children if child not in old]
        (self._folder / "rendezvous" / f"{role}-{replica}.json").unlink(missing_ok=True)  # of the ranks that are gone
        wait_s = self._config.supervision.backoff_s * 2 ** (number - 1)
        self._due.append((time.monotonic() + wait_s, [child.process for child in old]))
        self._due.sort(key=lambda due: due[0])

    def _end(self, pid: int, reason: str) -> None:
        """Kills a process that hangs; it is found dead, and replaced, like any other."""
        for child in self._children:
            if child.popen.pid == pid and child.popen.poll() is None:
                child.reports.insert(0, {"kind": REPLACE, "time": time.time(), "message": reason})
                _kill([child], signal.SIGKILL)

    def _raise_if_any_failed(self) -> None:
        if failed := [child for child in self._children if child.failed]:
            distance, time_s, message = min(_cause(child) for child in failed)
            raise RoleDied(message, distance=distance, time_s=time_s)

    def forward(self, number: signal.Signals) -> None:
        """Sends a signal to the processes that were started, not to those that they have started themselves."""
        for child in self._children:
            if child.popen.poll() is None:
                child.popen.send_signal(number)


def _close(children: Sequence[Child]) -> None:
    """Ends processes with all that they started: asks first, then does not."""
    _kill(children, signal.SIGTERM)
    deadline = time.monotonic() + _TERMINATE_S
    while time.monotonic() < deadline and any(child.popen.poll() is None for child in children):
        time.sleep(0.02)
    _kill(children, signal.SIGKILL)
    for child in children:
        child.popen.wait()
        child.report.close()


def _kill(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        try:
            os.killpg(child.popen.pid, number)
        except ProcessLookupError:
            continue


def _listen(child: Child) -> list[dict[str, Any]]:
    """What came out of the pipe since the last time: requests and notices, which are the caller's; a death is kept for `_cause`."""
    lines = [json.loads(line) for line in (child.report.read() or b"").splitlines()]
    child.ready |= any(line["kind"] == READY for line in lines)
    child.reports += [line for line in lines if line["kind"] not in (READY, REPLACE, NOTICE)]
    return [line for line in lines if line["kind"] in (REPLACE, NOTICE)]


def _devices(process: Process) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, process.devices))} if process.devices else {}


def _cause(child: Child) -> tuple[int, float, str]:
    """How far from the root this death is, when it happened, and what to tell the user: the least of all is the cause."""
    code = child.popen.returncode
    _listen(child)
    if child.reports:
        first = child.reports[0]
        return _DISTANCE.get(first["kind"], 1), first["time"], f"{child.process.name}: {first['message']} (log: {child.log})"
    if code < 0:
        return 0, 0.0, f"{child.process.name} was killed by {signal.Signals(-code).name} (log: {child.log})"
    return 4, 0.0, f"{child.process.name} ended with exit code {code} (log: {child.log})"
