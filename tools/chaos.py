"""Breaks runs on purpose, resumes them, and audits what came out. Two CPU cores, about a minute a seed.

    python tools/chaos.py --seeds 50 --json FILE

Each seed is one run of the demo's models (`--steps` optimizer steps), at max_lag 0 and 4 in turn. At moments that follow from the
seed, `--faults` of these happen to it:

    kill     SIGKILL for controller, learner, rollout, its engine, teacher or the launcher itself
    stop     SIGSTOP for controller, learner, rollout or teacher: a machine that no longer answers
    ask      SIGTERM for the launcher: an orderly end with a checkpoint
    noise    a stranger sends random bytes to the controller's port
    damage   SIGKILL for the launcher, then a flipped byte in the last kilobyte of the journal
    full     no room on the run's disk for some seconds (a small tmpfs; left out where it cannot be mounted)

A run that ends before its last step is resumed, until it has made all of them. Then the audit: every prompt trained exactly once
on the way to the last weights (`lost`, `twice`), no token older than max_lag (`lag_violations`), no run that neither went on nor
ended within `--patience` seconds (`hangs`), and no end without a last line that names a role or a signal (`unclear_errors`).
Recovery is the time from a fault to the next step that is on disk. Exit code 1 if anything was found.

JSON: {"runs": n, "lost": n, "twice": n, "lag_violations": n, "hangs": n, "unclear_errors": n, "worst_recovery_seconds": s,
"faults": {kind: n}}
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
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EXAMPLE = Path("examples/arithmetic")
ROLES = ("controller", "learner", "rollout", "teacher")
FAULTS = ("kill", "stop", "ask", "noise", "damage", "full")
BATCH, LAGS = 16, (0, 4)
SETTINGS = (
    "eval.prompts=", "eval.verifier=", f"loop.batch={BATCH}", "checkpoint.every_steps=3", "supervision.silent_s=6",
    "supervision.backoff_s=0.2", "supervision.restarts=10", "rollout.max_running=16", "run.peer_timeout_s=60", "run.start_timeout_s=120",
)  # fmt: skip
CLEAR = re.compile(r"controller|learner|rollout|teacher|SIG[A-Z]+|stopped before step|interrupted")


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


class Run:
    """One run directory, and the launcher that works on it at the moment."""

    def __init__(self, folder: Path, *, steps: int, max_lag: int, seed: int, patience_s: float, found: Findings) -> None:
        self.folder = folder
        self._steps, self._max_lag, self._seed, self._patience_s, self._found = steps, max_lag, seed, patience_s, found
        self._launcher: subprocess.Popen | None = None
        self._output = folder.with_suffix(".out")

    def start(self) -> None:
        """Starts or resumes it."""
        words = [f"run.dir={self.folder}", f"run.seed={self._seed}", f"loop.steps={self._steps}", f"loop.max_lag={self._max_lag}"]
        command = [sys.executable, "-m", "megatron_opd", "train", EXAMPLE / "config.yaml", "--resume", *SETTINGS, *words]
        with self._output.open("ab") as output:
            self._launcher = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def lines(self) -> list[dict]:
        """The steps that are on disk."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []

    def until(self, version: int) -> bool:
        """Waits for a step, resuming as often as that takes; False if there was neither a step nor an end for too long."""
        seen, changed = -1, time.monotonic()
        while True:
            lines = self.lines()
            if lines and lines[-1]["version"] >= version and (version < self._steps or self._launcher.poll() is not None):
                return True
            if len(lines) != seen:
                seen, changed = len(lines), time.monotonic()
            if self._launcher.poll() is not None:
                self._judge_end()
                self.start()
                changed = time.monotonic()
            if time.monotonic() - changed > self._patience_s:
                self._found.hangs += 1
                self.end()
                return False
            time.sleep(0.05)

    def strike(self, kind: str, rng: random.Random) -> None:
        """Lets one fault happen, and notes how long the run takes to make another step."""
        at = self.lines()[-1]["version"] if self.lines() else 0
        print(f"seed {self._seed}: {kind} at step {at}", flush=True)
        struck = time.monotonic()
        getattr(self, f"_{kind}")(rng)
        self._found.faults[kind] += 1
        if self.until(min(at + 1, self._steps)):
            self._found.worst_recovery_seconds = max(self._found.worst_recovery_seconds, time.monotonic() - struck)

    def audit(self) -> None:
        """Adds what is wrong with the finished run to the findings."""
        lines = self.lines()
        trained = Counter(index for line in lines for index in range(*line["prompts"]))
        self._found.lost += sum(index not in trained for index in range(self._steps * BATCH))
        self._found.lost += sum(BATCH - line["sequences"] for line in lines)
        self._found.twice += sum(count - 1 for count in trained.values())
        self._found.lag_violations += sum(int(lag) > self._max_lag for line in lines for lag in line["lags"])

    def end(self) -> None:
        """Kills the launcher; its roles do not outlive it."""
        if self._launcher is not None and self._launcher.poll() is None:
            self._launcher.kill()
        self._launcher.wait()
        time.sleep(0.5)

    def _judge_end(self) -> None:
        last = (self._output.read_text(errors="replace").strip().splitlines() or [""])[-1]
        if self._launcher.returncode not in (0, -signal.SIGKILL) and not CLEAR.search(last):
            print(f"seed {self._seed}: unclear: exit code {self._launcher.returncode}, {last!r}", flush=True)
            self._found.unclear_errors += 1

    def _role(self, name: str) -> psutil.Process | None:
        for child in psutil.Process(self._launcher.pid).children() if self._launcher.poll() is None else ():
            try:
                if child.cmdline()[3:5] == ["role", name]:
                    return child
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None

    def _kill(self, rng: random.Random) -> None:
        victim = rng.choice((*ROLES, "engine", "launcher"))
        if victim == "launcher":
            return self.end()
        process = self._role("rollout" if victim == "engine" else victim)
        if process is not None and victim == "engine":
            engines = [child for child in process.children(recursive=True) if "resource_tracker" not in " ".join(child.cmdline())]
            process = engines[0] if engines else process
        if process is not None:
            process.kill()

    def _stop(self, rng: random.Random) -> None:
        process = self._role(rng.choice(ROLES))
        if process is not None:
            process.suspend()

    def _ask(self, rng: random.Random) -> None:
        self._launcher.send_signal(signal.SIGTERM)

    def _noise(self, rng: random.Random) -> None:
        file = self.folder / "controller.json"
        if not file.exists():
            return  # between two processes
        address = json.loads(file.read_text())
        with socket.create_connection((address["host"], address["port"]), timeout=5) as stranger:
            stranger.sendall(rng.randbytes(100_000))

    def _damage(self, rng: random.Random) -> None:
        self.end()
        files = sorted((self.folder / "journal").glob("step-*.bin"))
        if files and (data := bytearray(files[-1].read_bytes())):
            data[-rng.randint(1, min(1024, len(data)))] ^= rng.randint(1, 255)
            files[-1].write_bytes(data)

    def _full(self, rng: random.Random) -> None:
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                time.sleep(rng.uniform(1, 5))
        filler.unlink()


def main() -> None:
    """Runs all seeds, prints and writes the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--faults", type=int, default=2, help="in each run")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds without a step or an end that count as a hang")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no run behind
    subprocess.run([EXAMPLE / "prepare.sh"], check=True)
    found = Findings()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        one(seed, arguments, found)
        print(f"after seed {seed}: {_json(found)}", flush=True)
    if arguments.json:
        arguments.json.write_text(_json(found))
    sys.exit(any((found.lost, found.twice, found.lag_violations, found.hangs, found.unclear_errors)))


def one(seed: int, arguments: argparse.Namespace, found: Findings) -> None:
    """One run with its faults."""
    rng = random.Random(seed)
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", place], capture_output=True).returncode == 0
    run = Run(place / "run", steps=arguments.steps, max_lag=LAGS[seed % len(LAGS)], seed=seed, patience_s=arguments.patience, found=found)
    try:
        run.start()
        moments = sorted(rng.sample(range(1, arguments.steps), arguments.faults))
        for moment in moments:
            if not run.until(moment):
                return
            time.sleep(rng.uniform(0, 1))
            run.strike(rng.choice(FAULTS if mounted else FAULTS[:-1]), rng)
        if run.until(arguments.steps):
            run.audit()
            found.runs += 1
    finally:
        run.end()
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)
        shutil.rmtree(place, ignore_errors=True)


def _json(found: Findings) -> str:
    return json.dumps({name: getattr(found, name) for name in found.__slots__})


if __name__ == "__main__":
    main()
