"""Whether memory stays flat over a long run in which one role is slow. Two CPU cores, about five minutes for each of the two.

    python tools/bench_memory.py --json FILE              # 500 steps with a slow learner, then 500 with a slow teacher
    python tools/bench_memory.py --slow teacher --steps 100

The demo's models, 8 prompts a step, max_lag 4. The slow role is stopped (SIGSTOP) for three quarters of the time, a fifth of a second
at once. Every half second the unique memory (USS) of each role, the processes that it has started included, is noted. The table shows
the median in each tenth of the steps; `growth` is the last fifth over the second fifth, when everybody has all that they need.

JSON: {SLOW: {"steps": n, "mib": {ROLE: [in each tenth]}, "growth": {ROLE: x}}}
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

CONFIG = "examples/arithmetic/config.yaml"
ROLES = ("controller", "learner", "rollout", "teacher")
SETTINGS = (
    "eval.prompts=", "eval.verifier=", "loop.batch=8", "loop.max_lag=4", "rollout.max_running=16", "learner.cores=[]", "teacher.cores=[]",
    "rollout.cores=[]", "guard.length_growth=0",
)  # fmt: skip
STOPPED_S, RUNS_S, NOTES_S, TENTHS = 0.2, 0.07, 0.5, 10


def main() -> None:
    """Runs one or both and prints what each role held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", choices=("learner", "teacher"), help="default: one after the other")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    subprocess.run([Path(CONFIG).with_name("prepare.sh")], check=True)
    figures = {slow: measure(slow, arguments.steps) for slow in ([arguments.slow] if arguments.slow else ("learner", "teacher"))}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(slow: str, steps: int) -> dict:
    """One run; see the module's JSON."""
    with tempfile.TemporaryDirectory() as folder, _launched(Path(folder) / "run", steps) as launcher:
        notes = list(_notes(launcher, Path(folder) / "run", slow))
        if launcher.wait() != 0:
            last = (Path(folder) / "run.out").read_text()[-2000:]
            sys.exit(f"the run ended with exit code {launcher.returncode}; its last words:\n{last}")
    mib, growth = {}, {}
    for role in ROLES:
        parts: list[list[float]] = [[] for _ in range(TENTHS)]
        for step, held in notes:
            parts[min(TENTHS - 1, TENTHS * step // steps)].append(held[role])
        mib[role] = [round(statistics.median(part), 1) if part else None for part in parts]
        growth[role] = round(_mean(mib[role][-2:]) / _mean(mib[role][2:4]), 3)
    table = Table("steps", *ROLES, title=f"MiB over {steps} steps, slow {slow}")
    for tenth in range(TENTHS):
        held = (mib[role][tenth] for role in ROLES)
        table.add_row(f"to {steps * (tenth + 1) // TENTHS}", *("" if one is None else f"{one:.0f}" for one in held))
    table.add_row("growth", *(f"{growth[role]:.3f}" for role in ROLES))
    Console().print(table)
    return {"steps": steps, "mib": mib, "growth": growth}


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else math.nan


@contextmanager
def _launched(folder: Path, steps: int) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "megatron_opd", "train", CONFIG, f"run.dir={folder}", f"loop.steps={steps}", *SETTINGS]
    with folder.with_suffix(".out").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()  # its roles do not outlive it
        process.wait()


def _notes(launcher: subprocess.Popen, folder: Path, slow: str) -> Iterator[tuple[int, dict[str, float]]]:
    """(steps made, MiB of each role) every half second from the first step on, while the slow role is slow."""
    lines = folder / "metrics.jsonl"
    while not lines.exists() or not lines.stat().st_size:
        if launcher.poll() is not None:
            return
        time.sleep(NOTES_S)
    roles = {words[4]: child for child in psutil.Process(launcher.pid).children() if (words := child.cmdline())[3:4] == ["role"]}
    threading.Thread(target=_hamper, args=(roles[slow],), daemon=True).start()
    while launcher.poll() is None:
        with suppress(psutil.NoSuchProcess):  # the run ends
            yield lines.read_bytes().count(b"\n"), {role: _mib(process) for role, process in roles.items()}
        time.sleep(NOTES_S)


def _hamper(process: psutil.Process) -> None:
    """Lets it run a quarter of the time, until it ends."""
    with suppress(psutil.NoSuchProcess):
        while True:
            process.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_S)
            process.send_signal(signal.SIGCONT)
            time.sleep(RUNS_S)


def _mib(process: psutil.Process) -> float:
    return sum(one.memory_full_info().uss for one in (process, *process.children(recursive=True))) / 2**20


if __name__ == "__main__":
    main()
