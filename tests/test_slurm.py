"""The job's script on a real SLURM with two nodes, with steps that are a few lines of shell."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd import slurm
from megatron_opd.errors import ConfigError
from megatron_opd.placement import cluster_resources, place
from tests.run import cluster

ROOT = Path(__file__).parent.parent
BASE = {
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "data": {"prompts": "p"},
    "slurm": {"time": "5"},
    "cluster": {"nodes": 2, "learner": [0], "rollout": [1], "teacher": [1]},
}
# Called as `python -m megatron_opd step RUN/config.yaml ROLE`. A first attempt waits for the signal or the scheduler's end.
STEP = """\
#!/bin/bash
run=$(dirname "$4") role=$5
echo "$role on $SLURMD_NODENAME of $MEGATRON_OPD_NODES" >>"$run/seen"
[ "$role" = "${FAILING:-}" ] && { sleep 1; echo "$role: out of luck" >"$run/failures/1-000-$role"; exit 1; }
[ "$role" = evaluate ] && { echo evaluated; exit 0; }
[ -n "${FAILING:-}" ] && exec sleep 100
[ -z "${LONG:-}" ] && { echo "$role ends"; exit 0; }
if [ ! -e "$run/saved" ] && [ "$role" = controller ]; then
  trap 'echo saved; touch "$run/saved"; exit 0' USR1
  touch "$run/ready"
  for _ in $(seq 300); do sleep 0.1; done
  exit 1
fi
while [ ! -e "$run/saved" ]; do sleep 0.1; done
[ "$role" = controller ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && touch "$run/summary.json"
exit 0
"""


def config(folder, **sections):
    return configs.resolve(OmegaConf.merge(BASE, {"run": {"dir": str(folder)}}, sections))


def script(made):
    return slurm.script(made, place(made, cluster_resources(made), generation=True))


def needs_slurm(test):
    """A test on a real SLURM: among the slower ones, and skipped with a loud reason where there is none."""
    return pytest.mark.engines(pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())(test))


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    with cluster.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield {**os.environ, **found}


def submit(made, folder, monkeypatch, variables):
    step = folder / "step"
    step.write_text(STEP)
    step.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(step))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (folder / "job.sbatch").write_text(script(made))
    return slurm.submit(folder / "job.sbatch")


def state(job):
    words = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return words.split("JobState=")[1].split()[0]


def nodes():
    return subprocess.run(["sinfo", "--noheader", "--format=%T %D"], capture_output=True, text=True, check=True).stdout.strip()


def wait(job, wanted, folder, limit_s=60):
    deadline = time.monotonic() + limit_s
    while (found := state(job)) != wanted:
        output = (folder / "job.log").read_text() if (folder / "job.log").exists() else "no output"
        assert time.monotonic() < deadline and found not in ("COMPLETED", "FAILED", "CANCELLED"), f"{found}: {output}"
        time.sleep(0.2)
    return (folder / "job.log").read_text()


@needs_slurm
def test_a_heterogeneous_job_gives_the_learner_a_component_of_its_own(tmp_path, monkeypatch, variables):
    """Before the tests that requeue: SLURM's backfill, which alone starts such jobs, may leave them for minutes behind a requeued one."""
    made = config(tmp_path, slurm={"hetjob_options": ["--comment=others"]})
    job = submit(made, tmp_path, monkeypatch, variables)
    wait(job, "COMPLETED", tmp_path, limit_s=90)
    seen = {line.split()[0]: line.split()[2] for line in (tmp_path / "seen").read_text().splitlines()}
    assert seen["learner"] == "n1" and seen["teacher"] == "n2"


@needs_slurm
def test_every_role_runs_on_its_node_and_the_evaluation_comes_last(tmp_path, monkeypatch, variables):
    job = submit(config(tmp_path, eval={"prompts": "h"}), tmp_path, monkeypatch, variables)
    output = wait(job, "COMPLETED", tmp_path)
    seen = {line.split()[0]: line.split() for line in (tmp_path / "seen").read_text().splitlines()}
    assert {role: words[2] for role, words in seen.items()} == {
        "controller": "n1", "learner": "n1", "rollout": "n2", "teacher": "n2", "evaluate": "n2",
    }  # fmt: skip
    assert seen["learner"][4] == "n1=127.0.0.1" and seen["learner"][5].startswith("n2=")
    assert output.strip().splitlines()[-1] == "evaluated"


@needs_slurm
def test_the_first_failure_ends_the_others_and_is_the_last_word(tmp_path, monkeypatch, variables):
    job = submit(config(tmp_path), tmp_path, monkeypatch, {**variables, "FAILING": "rollout"})
    start = time.monotonic()
    output = wait(job, "FAILED", tmp_path)
    assert output.strip().splitlines()[-1] == "rollout: out of luck"
    assert time.monotonic() - start < 30, "the other steps would sleep for 100 s"


@needs_slurm
def test_a_signalled_job_goes_back_into_the_queue_and_finishes(tmp_path, monkeypatch, variables):
    job = submit(config(tmp_path), tmp_path, monkeypatch, {**variables, "LONG": "1"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # what --signal=B:USR1@300 does
    deadline = time.monotonic() + 30
    while "back into the queue" not in (tmp_path / "job.log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "job.log").read_text()
        time.sleep(0.2)
    wait_requeued(job)
    wait(job, "COMPLETED", tmp_path)
    assert (tmp_path / "summary.json").exists()


@needs_slurm
def test_a_node_that_goes_down_puts_the_job_back_into_the_queue(tmp_path, monkeypatch, variables):
    job = submit(config(tmp_path), tmp_path, monkeypatch, {**variables, "LONG": "1"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(["scontrol", "update", "nodename=n2", "state=down", "reason=test"], check=True)
    (tmp_path / "saved").touch()
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=True)
    wait_requeued(job)
    wait(job, "COMPLETED", tmp_path)
    assert (tmp_path / "summary.json").exists()


def wait_requeued(job):
    """A requeued job may not start for two minutes; the test need not wait for that, but for the end of the first attempt."""
    deadline = time.monotonic() + 30
    while state(job) != "PENDING" or nodes() != "idle 2":
        assert time.monotonic() < deadline, (state(job), nodes())
        time.sleep(0.2)
    time.sleep(1)
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)


@needs_slurm
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"slurm": {"options": ["--partition=nowhere"]}}, "Invalid partition name specified"),
        ({"cluster": {"nodes": 3}}, "Node count specification invalid"),
    ],
)
def test_what_sbatch_refuses_is_told_in_its_own_words(tmp_path, monkeypatch, variables, sections, message):
    with pytest.raises(ConfigError, match=f"sbatch refuses .*job.sbatch: .*{message}"):
        submit(config(tmp_path, **sections), tmp_path, monkeypatch, variables)
    assert not (tmp_path / "job.sbatch").exists(), "the directory may be used again"


def test_what_no_script_can_do_is_refused(tmp_path, monkeypatch):
    made = config(tmp_path)
    with pytest.raises(ConfigError, match=r"slurm\.time is missing; name the job's time limit"):
        script(replace(made, slurm=replace(made.slurm, time="")))
    swapped = config(tmp_path, cluster={"learner": [1], "rollout": [0]}, slurm={"hetjob_options": ["-pa"]})
    with pytest.raises(ConfigError, match=r"learners run on nodes \[1\] of 2; set cluster\.learner to the first nodes"):
        script(swapped)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the PATH; submit from a login node"):
        slurm.require_sbatch()


@pytest.mark.parametrize(("name", "example"), [("one_job", "llama70b_from_405b"), ("hetjob", "qwen32b_from_235b_moe")])
def test_the_scripts_that_people_read_are_those_that_are_made(monkeypatch, name, example):
    """After a change of the script: MEGATRON_OPD_WRITE=1 pytest tests/test_slurm.py"""
    file = ROOT / "slurm" / f"{name}.sbatch"
    made = configs.load(ROOT / "examples" / "cluster" / f"{example}.yaml")
    monkeypatch.setattr(os, "getcwd", lambda: "/shared/megatron_opd")
    monkeypatch.setattr(sys, "executable", "/shared/megatron_opd/.venv/bin/python")
    text = script(made)
    if os.environ.get("MEGATRON_OPD_WRITE"):
        file.write_text(text)
    assert file.read_text() == text
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0


def test_a_container_wraps_every_step(tmp_path):
    text = script(config(tmp_path, slurm={"container_image": "/images/opd.sqsh", "container_mounts": "/data:/data"}))
    assert "--container-image=/images/opd.sqsh --container-mounts=/data:/data" in text and "megatron-opd step" in text


@pytest.mark.parametrize("options", [[], ["--partition=gpu"]])
def test_a_job_on_gpus_asks_for_them(tmp_path, options):
    sections = {"run": {"device": "cuda"}, "slurm": {"time": "1:00:00", "options": options}}
    with pytest.raises(ConfigError, match=r"slurm\.options asks for no GPUs, so a job would start without; add --gres=gpu:8"):
        script(config(tmp_path, **sections))
    for asking in ("--gres=gpu:h100:8", "--gpus-per-node=8"):
        made = config(tmp_path, **sections | {"slurm": {"time": "1:00:00", "options": [*options, asking]}})
        assert f"#SBATCH {asking}" in script(made)
