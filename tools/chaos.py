"""Breaks runs on purpose, resumes them, and audits what came out. Two CPU cores, less than a minute a seed.

    python tools/chaos.py --seeds 50 --json FILE

Each seed is one run of the demo's models (`--steps` optimizer steps of 8 prompts), in turn at max_lag 0 and 4, with roles apart and
colocated, and with each kind of fault; 32 seeds go round once. `--faults` of them happen to it, at moments that follow from the seed, the
time before the first step included:

    kill     SIGKILL for controller, learner, rollout, its engine, teacher or the launcher itself
    stop     SIGSTOP for controller, learner, rollout or teacher: a machine that no longer answers
    ask      SIGTERM for the launcher: an orderly end with a checkpoint
    noise    a stranger sends random bytes to the controller's port
    damage   SIGKILL for the launcher, then a flipped byte in the last kilobyte of the journal
    full     no room on the run's disk for some seconds (a small tmpfs; left out where it cannot be mounted)

A run that ends before its last step is resumed, until it has made all of them. Then the audit: every prompt trained exactly once
on the way to the last weights (`lost`, `twice`), no token older than max_lag (`lag_violations`), no run that made no step within
`--patience` seconds, however often it was resumed (`hangs`), no end without a last line that names a role, a signal or the full disk,
and no error that only a programmer would understand (`unclear_errors`). Recovery is the time from a fault to the next step that is on
disk. Exit code 1 if anything was found.

JSON: {"runs": n, "lost": n, "twice": n, "lag_violations": n, "hangs": n, "unclear_errors": n, "worst_recovery_seconds": s,
"faults": {kind: n}, "seconds": s}
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import psutil

FAULTS = ("kill", "stop", "ask", "kill", "noise", "stop", "damage", "full")  # in turn: the hard ones twice
LAGS = (0, 4)
ROLES = ("controller", "learner", "rollout", "teacher")
SETTINGS = (
    "checkpoint.every_steps=3", "supervision.silent_s=6", "supervision.backoff_s=0.2", "supervision.restarts=10",
    "run.start_timeout_s=90", "run.peer_timeout_s=60",
)  # fmt: skip
DEMO = ("eval.prompts=", "eval.verifier=", "rollout.max_running=16", "learner.cores=[]", "teacher.cores=[]", "rollout.cores=[]")
CLEAR = re.compile(r"controller|learner|rollout|teacher|SIG[A-Z]+|stopped before step|interrupted|No space left")
CRASH = re.compile(r"(Assertion|Attribute|Index|Key|Name|Type|Value|JSONDecode|Unicode\w+|Recursion)Error")  # nobody foresaw it


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is broken, how often, and how long it may take to mend itself."""

    config: Path = Path("examples/arithmetic/config.yaml")
    settings: tuple[str, ...] = DEMO  # key=value over it and over SETTINGS
    colocated: tuple[bool, ...] = (False, True)  # layouts, in turn
    steps: int = 12
    batch: int = 8
    faults: int = 1  # in each run
    only: tuple[str, ...] = FAULTS
    patience_s: float = 300.0


@dataclass(slots=True)
class Findings:
    """What the audit counts, under the names of the JSON."""

    runs: int = 0
    lost: int = 0
    twice: int = 0
    lag_violations: int = 0
    hangs: int = 0
    unclear_errors: int = 0
    worst_recovery_seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether anything was found."""
        return any((self.lost, self.twice, self.lag_violations, self.hangs, self.unclear_errors))

    def to_json(self) -> str:
        """One line."""
        return json.dumps({each.name: getattr(self, each.name) for each in fields(self)})


class Run:
    """One run directory, and the launcher that works on it at the moment."""

    def __init__(self, folder: Path, setup: Setup, found: Findings, *, seed: int, max_lag: int, colocated: bool) -> None:
        self._folder, self._setup, self._found, self._seed, self._max_lag = folder, setup, found, seed, max_lag
        words = [f"run.dir={folder}", f"run.seed={seed}", f"run.colocated={colocated}", f"loop.max_lag={max_lag}"]
        words += [f"loop.steps={setup.steps}", f"loop.batch={setup.batch}", *SETTINGS, *setup.settings]
        self._command = [sys.executable, "-m", "megatron_opd", "train", str(setup.config), "--resume", *words]
        self._output = folder.parent.with_suffix(".out")  # not on the disk that fills up
        self._start()

    def _start(self) -> None:
        """Starts or resumes it."""
        with self._output.open("ab") as output:
            self._launcher = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def until(self, version: int) -> bool:
        """Waits for a step, or for the end behind the last one, resuming as often as that takes; False if nothing moves for too long."""
        seen, changed = -1, time.monotonic()
        while not self._is_at(version):
            if (at := self._version()) != seen:
                seen, changed = at, time.monotonic()
            if self._launcher.poll() is not None:
                self._judge_end()
                self._start()
            if time.monotonic() - changed > self._setup.patience_s:
                self._say(f"nothing has moved for {self._setup.patience_s:g} s at step {seen}; {self._last_line()!r}")
                self._found.hangs += 1
                return False
            time.sleep(0.05)
        return True

    def strike(self, kind: str, rng: random.Random) -> None:
        """Lets one fault happen, and notes how long the run takes to make another step."""
        at, struck = self._version(), time.monotonic()
        what = getattr(self, f"_{kind}")(rng)
        self._say(f"{kind} {what} at step {at}")
        self._found.faults[kind] += 1
        if self.until(min(at + 1, self._setup.steps)):
            self._found.worst_recovery_seconds = max(self._found.worst_recovery_seconds, round(time.monotonic() - struck, 1))

    def audit(self) -> None:
        """Adds what is wrong with the finished run to the findings."""
        audit(self._lines(), self._setup, self._max_lag, self._found)
        self._found.runs += 1

    def end(self) -> None:
        """Kills the launcher; its roles do not outlive it."""
        if self._launcher.poll() is None:
            self._launcher.kill()
        self._launcher.wait()
        time.sleep(0.5)

    def _is_at(self, version: int) -> bool:
        if version < self._setup.steps:
            return self._version() >= version
        return self._version() == version and self._launcher.poll() == 0

    def _lines(self) -> list[dict]:
        """The steps that are on disk."""
        file = self._folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []

    def _version(self) -> int:
        lines = self._lines()
        return lines[-1]["version"] if lines else 0

    def _last_line(self) -> str:
        return (self._output.read_text(errors="replace").strip().splitlines() or [""])[-1]

    def _judge_end(self) -> None:
        code, last = self._launcher.returncode, self._last_line()
        if code not in (0, -signal.SIGKILL, -signal.SIGTERM) and (CRASH.search(last) or not CLEAR.search(last)):
            self._say(f"unclear: exit code {code}, {last!r}")
            self._found.unclear_errors += 1

    def _say(self, words: str) -> None:
        print(f"seed {self._seed}: {words}", flush=True)

    def _roles(self) -> dict[str, psutil.Process]:
        """Those that run at the moment."""
        found = {}
        for child in psutil.Process(self._launcher.pid).children() if self._launcher.poll() is None else ():
            try:
                words = child.cmdline()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if words[3:4] == ["role"]:
                found[words[4]] = child
        return found

    def _kill(self, rng: random.Random) -> str:
        roles = self._roles()
        victim = rng.choice([*roles, *(["engine"] if "rollout" in roles else []), "launcher"])
        if victim == "launcher":
            self.end()
        else:
            (_engine(roles["rollout"]) if victim == "engine" else roles[victim]).kill()
        return victim

    def _stop(self, rng: random.Random) -> str:
        roles = self._roles()
        if not roles:
            return "nobody"  # between two processes
        victim = rng.choice([*roles])
        roles[victim].suspend()
        return victim

    def _ask(self, rng: random.Random) -> str:
        self._launcher.send_signal(signal.SIGTERM)
        return "launcher"

    def _noise(self, rng: random.Random) -> str:
        file = self._folder / "controller.json"
        if not file.exists():
            return "nobody"  # between two processes
        address = json.loads(file.read_text())
        with socket.create_connection((address["host"], address["port"]), timeout=5) as stranger:
            stranger.sendall(rng.randbytes(100_000))
        return "controller"

    def _damage(self, rng: random.Random) -> str:
        self.end()
        files = sorted((self._folder / "journal").glob("step-*.bin"))
        if not files or not (data := bytearray(files[-1].read_bytes())):
            return "launcher"  # there is no journal yet
        data[-rng.randint(1, min(1024, len(data)))] ^= rng.randint(1, 255)
        files[-1].write_bytes(data)
        return "journal"

    def _full(self, rng: random.Random) -> str:
        filler = self._folder.with_name("filler")
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))
            time.sleep(rng.uniform(1, 5))
        filler.unlink()
        return "disk"


def chaos(setup: Setup, seeds: Iterable[int]) -> Findings:
    """Runs all seeds, one after another."""
    found, started = Findings(), time.monotonic()
    for seed in seeds:
        _one(seed, setup, found)
        found.seconds = round(time.monotonic() - started, 1)
        print(f"after seed {seed}: {found.to_json()}", flush=True)
    return found


def audit(lines: list[dict], setup: Setup, max_lag: int, found: Findings) -> None:
    """Adds to the findings what is wrong with the steps of a finished run."""
    trained = Counter(index for line in lines for index in range(*line["prompts"]))
    found.lost += sum(index not in trained for index in range(setup.steps * setup.batch))
    found.lost += sum(len(range(*line["prompts"])) - line["sequences"] for line in lines)
    found.twice += sum(count - 1 for count in trained.values())
    found.lag_violations += sum(int(lag) > max_lag for line in lines for lag in line["lags"])


def main() -> None:
    """Runs the demo under all seeds, prints and writes the findings."""
    usual = Setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=usual.steps, help="optimizer steps of each run")
    parser.add_argument("--faults", type=int, default=usual.faults, help="in each run")
    parser.add_argument("--only", nargs="+", choices=sorted({*FAULTS}), default=FAULTS, help="these kinds of faults, in turn")
    parser.add_argument("--patience", type=float, default=usual.patience_s, help="seconds without a step that count as a hang")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no run behind
    subprocess.run([usual.config.parent / "prepare.sh"], check=True)
    only, patience_s = tuple(arguments.only), arguments.patience
    setup = Setup(steps=arguments.steps, faults=arguments.faults, only=only, patience_s=patience_s)
    found = chaos(setup, range(arguments.first, arguments.first + arguments.seeds))
    if arguments.json:
        arguments.json.write_text(found.to_json())
    sys.exit(found.bad)


def _one(seed: int, setup: Setup, found: Findings) -> None:
    """One run with its faults."""
    rng = random.Random(seed)
    max_lag, layout, first = LAGS[seed % 2], setup.colocated[seed // 2 % len(setup.colocated)], seed // (2 * len(setup.colocated))
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", place], capture_output=True).returncode == 0
    kinds = [kind for kind in setup.only if mounted or kind != "full"]
    run = Run(place / "run", setup, found, seed=seed, max_lag=max_lag, colocated=layout)
    try:
        for number, moment in enumerate(sorted(rng.sample(range(setup.steps), setup.faults))):
            if not run.until(moment):
                return
            time.sleep(rng.uniform(0, 10 if moment == 0 else 0.5))  # the start takes longer than a step
            run.strike(kinds[(first + number) % len(kinds)], rng)
        if run.until(setup.steps):
            run.audit()
    finally:
        run.end()
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)
        shutil.rmtree(place, ignore_errors=True)
        place.with_suffix(".out").unlink()


def _engine(rollout: psutil.Process) -> psutil.Process:
    """The process in which vLLM decodes; the rollout itself while there is none."""
    engines = [child for child in rollout.children(recursive=True) if "resource_tracker" not in " ".join(child.cmdline())]
    return engines[0] if engines else rollout


if __name__ == "__main__":
    main()
