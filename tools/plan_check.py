"""`megatron-opd plan` against reality, on the demo: predicted and measured step time and peak memory of the learner. Two CPU cores.

    python tools/plan_check.py --json FILE [--dir DIR] [--steps 15]        # about 6 minutes, more where cores are shared

One synchronous run calibrates the plan's speeds and the bytes that a process has before any model; the other runs differ from
it in lag, batch, decoding width, model or cores, and are predicted from it. DIR (default: a new one) keeps the runs: a second call
continues there. Step time is the median of the steps behind the first `max_lag + 2`; memory is the largest resident set of the learner.

JSON: {"cases": [{"name", "predicted_seconds", "measured_seconds", "predicted_bytes", "measured_bytes"}], "calibration": {...}}
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_opd import config as configs
from megatron_opd.data.prompts import load_records, load_tokenizer
from megatron_opd.plan.gpus import CPU_RESERVE_BYTES
from megatron_opd.plan.plan import make_plan

EXAMPLE = Path("examples/arithmetic")
CALIBRATION = "calibration"
CASES = {  # name -> what differs from the demo
    CALIBRATION: ["loop.max_lag=0"],
    "max_lag 4": ["loop.max_lag=4"],
    "batch 64": ["loop.max_lag=0", "loop.batch=64"],
    "8 decode at a time, max_lag 2": ["loop.max_lag=2", "rollout.max_running=8"],
    "larger student, max_lag 1": ["loop.max_lag=1", "student.path=examples/arithmetic/models/teacher"],
    "teacher beside the rollouts, max_lag 2": ["loop.max_lag=2", "teacher.cores=[0]"],
}
_EVERYWHERE = ["eval.prompts=", "eval.verifier="]


def main() -> None:
    """Runs the cases, plans them, prints both side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dir", type=Path, help="keeps the runs")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of each run")
    arguments = parser.parse_args()
    folder = arguments.dir or Path(tempfile.mkdtemp(prefix="plan_check-"))
    subprocess.run([EXAMPLE / "prepare.sh"], check=True)
    measured = {name: run(folder / name.replace(" ", "_").replace(",", ""), words, arguments.steps) for name, words in CASES.items()}
    cases = compare(folder, measured)
    show(cases)
    if arguments.json:
        calibration = {"seconds": measured[CALIBRATION][0], "bytes": measured[CALIBRATION][1], "steps": arguments.steps}
        arguments.json.write_text(json.dumps({"cases": cases, "calibration": calibration}, indent=1) + "\n")


def run(folder: Path, words: list[str], steps: int) -> tuple[float, int]:
    """One run of the product: median seconds of a step, peak bytes of the learner."""
    if not (folder / "peak").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was ended
        command = [sys.executable, "-m", "megatron_opd", "train", str(EXAMPLE / "config.yaml"), f"run.dir={folder}", f"loop.steps={steps}"]
        process = subprocess.Popen([*command, *_EVERYWHERE, *words], stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(0.2)
        if process.returncode:
            sys.exit(f"the run in {folder} ended with exit code {process.returncode}")
        (folder / "peak").write_text(str(peak))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    warm = configs.load(folder / "config.yaml").loop.max_lag + 2
    return statistics.median(line["step_seconds"] for line in lines[warm:]), int((folder / "peak").read_text())


def _peak_bytes(launcher: int) -> int:
    """VmHWM of the learner among the launcher's children, 0 while there is none."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split() if os.path.exists(f"/proc/{launcher}") else []:
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"learner" in words:
                status = Path(f"/proc/{child}/status").read_text()
                return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return 0  # it ended meanwhile
    return 0


def compare(folder: Path, measured: dict[str, tuple[float, int]]) -> list[dict]:
    """What the plan says of each case, the calibration itself left out."""
    given = configs.load(EXAMPLE / "config.yaml")
    records = load_records(given.data.prompts, load_tokenizer(given.student.path), given.data, completions=False)
    prompt = round(statistics.mean(len(record.prompt_ids) for record in records))
    settings = [*_EVERYWHERE, f"plan.calibration={folder / CALIBRATION}", f"plan.prompt_tokens={prompt}", "plan.spread=0.4"]
    plans = {name: make_plan(configs.load(EXAMPLE / "config.yaml", [*settings, *words])) for name, words in CASES.items()}
    models = {name: sum(plan.memory["learner"].values()) - CPU_RESERVE_BYTES for name, plan in plans.items()}
    reserve = measured[CALIBRATION][1] - models[CALIBRATION]
    return [
        {
            "name": name,
            "predicted_seconds": plans[name].outcomes[configs.load(EXAMPLE / "config.yaml", words).loop.max_lag].step_s,
            "measured_seconds": measured[name][0],
            "predicted_bytes": int(models[name] + reserve),
            "measured_bytes": measured[name][1],
        }
        for name, words in CASES.items()
        if name != CALIBRATION
    ]


def show(cases: list[dict]) -> None:
    """Side by side."""
    table = Table(
        "case", "s/step predicted", "measured", "off by", "learner MB predicted", "measured", "off by", title="plan against reality"
    )
    for case in cases:
        seconds, size = (case[f"predicted_{unit}"] / case[f"measured_{unit}"] - 1 for unit in ("seconds", "bytes"))
        table.add_row(
            case["name"], f"{case['predicted_seconds']:.3f}", f"{case['measured_seconds']:.3f}", f"{100 * seconds:+.0f} %",
            f"{case['predicted_bytes'] / 1e6:.0f}", f"{case['measured_bytes'] / 1e6:.0f}", f"{100 * size:+.0f} %",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
