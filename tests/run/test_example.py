"""The example that ships with trained models: its own files by the real command line, for two steps in place of 130."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_opd.types import RunSummary
from tests.run import tiny_run

pytestmark = pytest.mark.engines

EXAMPLE = Path(__file__).parents[2] / "examples/arithmetic"
HELD_OUT = 64  # the first of the 500 of which README's table tells


def test_the_demo_runs_from_its_own_files_and_starts_where_the_readme_says(tmp_path):
    make = [sys.executable, EXAMPLE / "make_data.py", "--out", tmp_path, "--heldout", "500", "--prompts", "300", "--sft", "1"]
    subprocess.run(make, check=True, timeout=120)
    run, data = tmp_path / "run", tmp_path / "data"
    files = [f"run.dir={run}", f"data.prompts={data / 'prompts.jsonl'}", f"eval.prompts={data / 'heldout.jsonl'}"]
    output = tiny_run.train(EXAMPLE / "config.yaml", *files, "loop.steps=2", f"eval.limit={HELD_OUT}")
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {field.name for field in fields(RunSummary)} and None not in summary.values()
    assert summary["steps"] == 2 and summary["max_lag"] == 4 and summary["tokens"] > 2 * 128 * 10
    assert summary["accuracy_before"] == pytest.approx(0.348, abs=0.05) and summary["teacher_accuracy"] == pytest.approx(0.994, abs=0.03)
    assert summary["kl_before"] == pytest.approx(0.925, abs=0.3) and summary["hf_export"] == str(run / "hf")
    assert "run summary" in output and "step 2" in output
