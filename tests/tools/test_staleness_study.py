import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_opd.errors import ConfigError, OPDError
from tools import staleness_study as study


def line(arm, lag, seed, accuracy, kl, stopped=None):
    ratios = dict.fromkeys(study.RATIOS)
    before = {"accuracy_before": 0.25, "kl_before": 0.9, "teacher_accuracy": 1.0}
    cell = {"arm": arm, "lag": lag, "seed": seed, "accuracy": accuracy, "kl": kl, "stopped": stopped, "steps": 144, "step_seconds": 0.4}
    return cell | ratios | {"losses": [1.0]} | before | {"seconds": 90.0}


LINES = [
    line("forward_kl", 0, 1, 0.96, 0.02),
    line("forward_kl", 0, 0, 0.94, 0.01),
    line("forward_kl", 1, 0, 0.90, 0.03),
    line("frozen", 0, 0, 0.80, 0.10),
    line("frozen", 64, 0, None, None, "step 70: the loss is nan"),
]


@pytest.fixture
def out(tmp_path):
    study._keep_settings(tmp_path, {"loop.steps": "144"})
    for one in LINES:
        study.append(tmp_path, one)
    return tmp_path


def test_the_slope_of_a_line_is_its_own():
    assert study.slope([0, 1, 3, 7], [[0.9, 0.9], [0.88], [0.86], [0.84]]) == pytest.approx(-2.0)
    assert study.slope([4], [[0.5]]) is None


def test_a_run_that_stopped_counts_as_accuracy_0_and_has_no_kl():
    found = study.summarise(LINES)["arms"]["frozen"]
    assert found["accuracy"] == [[0.80], [None]] and found["kl"] == [[0.10], [None]]
    assert found["slope"] == pytest.approx(-80 / 6.0224, rel=1e-3)
    assert study.counted(found, "kl") == [[0.10], []]


def test_the_grid_runs_seed_by_seed_with_the_telling_lags_and_the_main_arms_first():
    cells = study.plan()
    assert len(cells) == 8 * (6 * 3 + 8)
    assert [(cell.arm, cell.lag) for cell in cells[:15:14]] == [("forward_kl", 0), ("forward_kl", 64)]
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert study.plan("sequence,draws", "4,3", 2)[:3] == [
        study.Cell("draws", 4, 0),
        study.Cell("sequence", 4, 0),
        study.Cell("draws", 3, 0),
    ]


def test_an_unknown_arm_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown arm head_tails; did you mean head_tail\?"):
        study.plan("draws,head_tails")


def arguments(monkeypatch, out, *words):
    monkeypatch.setattr("sys.argv", ["staleness_study.py", "--out", str(out), *words])
    return study._arguments()


def test_a_study_goes_on_with_the_cells_that_are_missing(tmp_path, monkeypatch):
    ran = []

    async def run(cell, settings, out, core):
        ran.append(cell)
        if len(ran) == 3:
            raise OPDError("killed")
        return line(cell.arm, cell.lag, cell.seed, 0.5, 0.1)

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study.subprocess, "run", lambda command, check: None)
    given = arguments(monkeypatch, tmp_path, "--arms=frozen,draws", "--lags", "0,4", "--seeds", "1", "--jobs=1", "rollout.dtype=float32")
    with pytest.raises(OPDError, match="killed"):
        study.study(given)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"arm": "frozen", "la')  # as a power cut may leave it
    study.study(given)
    assert ran[2] == ran[3] and set(ran) == set(study.plan("frozen,draws", "0,4", 1)) and len(ran) == 5
    assert len(study.read(tmp_path)) == 4
    with pytest.raises(ConfigError, match=r"ran with loop\.steps=144, not 100"):
        study.study(arguments(monkeypatch, tmp_path, "--lags=0,4", "--steps=100", "rollout.dtype=float32"))
    with pytest.raises(ConfigError, match="--steps=4 never reaches lag 4"):
        study.study(arguments(monkeypatch, tmp_path, "--lags=0,4", "--steps=4"))


PRODUCT = """#!/bin/sh
for word; do case $word in run.dir=*) folder=${word#run.dir=};; esac; done
ratios='"ratio_p01": 0.5, "ratio_p50": 1.0, "ratio_p99": 2.0, "effective_samples": 0.9'
for step in 1 2 3 4 5; do echo '{"loss": 0.5, "step_seconds": 0.4, "diagnostics": {'"$ratios"'}}'; done > "$folder/metrics.jsonl"
echo "$SAID"
exit 1
"""  # one that fails after five steps


def test_a_run_says_what_it_died_of_unless_it_went_wrong_by_itself(tmp_path, monkeypatch):
    product = tmp_path / "product"
    product.write_text(PRODUCT)
    product.chmod(0o755)
    monkeypatch.setattr(study.sys, "executable", str(product))

    def run(said):
        monkeypatch.setenv("SAID", said)
        return asyncio.run(study.run(study.Cell("frozen", 4, 0), {}, tmp_path, 0))

    found = run("step 5  tokens/s 1\nRoleDied: learner-0: step 6: the loss is nan; lower learner.optimizer.lr (log: x)")
    assert (
        found["step_seconds"] == 0.4
        and found["stopped"] == "step 6: the loss is nan"
        and found["accuracy"] is None
        and found["ratio_p99"] == 2.0
    )
    assert not list((tmp_path / "runs").iterdir())
    with pytest.raises(OPDError, match="out of memory"):
        run("RoleDied: teacher-0: out of memory")


def test_a_study_that_is_ended_takes_its_cells_with_it(tmp_path, monkeypatch):
    product = tmp_path / "product"
    product.write_text('#!/bin/sh\ntrap \'touch "$(mktemp -p "$ENDED")"; exit 1\' TERM\nwhile :; do sleep 0.05; done\n')
    product.chmod(0o755)
    (tmp_path / "ended").mkdir()
    monkeypatch.setattr(study.sys, "executable", str(product))
    monkeypatch.setattr(study.subprocess, "run", lambda command, check: None)
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit, match="the same command goes on from there"):
        study.study(arguments(monkeypatch, tmp_path, "--arms=frozen", "--lags=0,4", "--seeds=1", "--jobs=2"))
    assert len(list((tmp_path / "ended").iterdir())) == min(2, len(os.sched_getaffinity(0)))


def test_the_report_replaces_figures_and_keeps_words(out):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install -e '.[study]'")
    (out / "README.md").write_text(
        "Words.\n<!-- figures: finding 1 -->\nold\n<!-- end -->\nMore.\n<!-- figures: finding 4 -->\nkept\n<!-- end -->\n"
    )
    sizes = {"16": (0.7, 0.2, 0.4, 10, 15), "64": (0.18, 0.02, 0.06, 30, 60)}
    named = {
        size: {"draws": draws, "head_tail": head_tail, "draws_same_storage": same, "stored": {"draws": few, "head_tail": many}}
        for size, (draws, head_tail, same, few, many) in sizes.items()
    }
    (out / "variance.json").write_text(json.dumps({"cache_ids": named}))
    study.report(out, out / "variance.json", None, out / "figures.json")
    text = (out / "README.md").read_text()
    assert "| forward_kl | 95.0 ± 1.4 | 90.0 |  | -5.00 |" in text and "| frozen | 80.0 |  | 0.0* | -13.28 |" in text
    assert "| forward_kl | 0.015 ± 0.007 | 0.030 |  |" in text and "| frozen | 0.100 |  | –* |" in text
    assert text.startswith("Words.") and "More." in text and "kept" in text and "old" not in text and "None of its arms" not in text
    assert len((out / "cells.csv").read_text().splitlines()) == 1 + len(LINES)
    assert (out / "lag.png").stat().st_size > 10_000 and (out / "variance.png").stat().st_size > 5_000
    found = json.loads((out / "figures.json").read_text())["arms"]
    assert found["forward_kl"] == {
        "lags": [0, 1],
        "accuracy": [[0.94, 0.96], [0.9]],
        "kl": [[0.01, 0.02], [0.03]],
        "slope": pytest.approx(-5),
    }


def test_every_section_of_the_readme_is_one_that_the_tool_fills():
    names = re.findall("<!-- figures: (.*?) -->", (study.HOME / "README.md").read_text())
    assert sorted(names) == sorted(["setting", "curves", *study.FINDINGS, "bias", "variance", "finding 4"])


def test_exact_arms_have_no_bias_and_the_others_do_on_stale_data():
    stale = {name: study.bias(arm, 1.0) for name, arm in study.ARMS.items()}
    exact = {"recomputed", "draws", "head_tail", "dense_reverse_kl"}
    assert all((value < 1e-10) == (name in exact) for name, value in stale.items()), stale
    assert study.bias(study.ARMS["frozen"], 0.0) < 1e-10


@pytest.mark.engines
def test_a_quick_study_ends_with_its_figures(tmp_path):
    command = [sys.executable, "tools/staleness_study.py", "--quick", "--out", tmp_path, "--json", tmp_path / "figures.json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    arms = json.loads((tmp_path / "figures.json").read_text())["arms"]
    assert arms.keys() == {"forward_kl", "recomputed"}
    assert all(arm["lags"] == [0, 4] and all(kl[0] > 0 for kl in arm["kl"]) for arm in arms.values())
    assert (tmp_path / "lag.png").stat().st_size > 10_000 and "| recomputed |" in (tmp_path / "README.md").read_text()
