"""The whole system as a job of a real SLURM with two nodes."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest

from tests.run import cluster, tiny_run

pytestmark = [pytest.mark.engines, pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())]

STEPS = 60
LAYOUT = {"learner": {"tensor_parallel": 2}, "cluster": {"nodes": 2, "learner": [0], "rollout": [1], "teacher": [1]}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    tiny: tiny_run.Tiny
    variables: dict[str, str]

    def run(self, *words):
        done = subprocess.run(words, env=self.variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, config, *overrides):
        """`launch slurm`; returns the job's number."""
        launch = (sys.executable, "-m", "megatron_opd", "launch", "slurm", str(config), "slurm.time=30", *overrides)
        return self.run(*launch).stdout.split()[1]

    def state(self, job):
        return self.run("scontrol", "--oneliner", "show", "job", job).stdout.split("JobState=")[1].split()[0]

    def wait(self, job, name, *states, timeout_s=240):
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}: {self.log(name)}"
            assert time.monotonic() < deadline, f"{state}: {self.log(name)}"
            time.sleep(0.3)

    def wait_for_step(self, job, name, step, timeout_s=150):
        """Returns once so many steps are made."""
        lines = self.tiny.folder / name / "metrics.jsonl"
        deadline = time.monotonic() + timeout_s
        while not lines.exists() or lines.read_text().count("\n") < step:
            assert self.state(job) in ("PENDING", "CONFIGURING", "RUNNING") and time.monotonic() < deadline, self.log(name)
            time.sleep(0.2)

    def kill(self, name, role):
        """SIGKILL for a process of a role of this run."""
        words = ["role", role, str(self.tiny.folder / name / "config.yaml")]
        next(process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [])[3:6] == words).kill()

    def wait_requeued(self, job, name, timeout_s=120):
        """Returns once the job waits and nothing of its attempt is left."""
        ours = str(self.tiny.folder / name / "config.yaml")

        def left():
            lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
            return [line for line in lines if ours in line or "slurm_script" in line or line.startswith(f"slurmstepd: [{job}.")]

        deadline = time.monotonic() + timeout_s
        while self.state(job) != "PENDING" or left():
            assert time.monotonic() < deadline, (self.state(job), left(), self.log(name))
            time.sleep(0.2)

    def wait_for_nodes(self, timeout_s=150):
        """A node that was set down comes back when it next reports (ReturnToService=2)."""
        deadline = time.monotonic() + timeout_s
        while (states := self.run("sinfo", "--noheader", "--format=%T %D").stdout.strip()) != "idle 2":
            assert time.monotonic() < deadline, states
            time.sleep(0.5)

    def start_again(self, job):
        """Sooner than the two minutes for which SLURM lets a requeued job wait: it kills what is left by the job's number."""
        time.sleep(cluster.KILL_WAIT_S + 2)
        self.run("scontrol", "update", f"jobid={job}", "starttime=now")

    def log(self, name):
        file = self.tiny.folder / name / "job.log"
        return file.read_text() if file.exists() else "no output"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with cluster.cluster(tmp_path_factory.mktemp("slurm")) as variables:
        tiny = tiny_run.make(tmp_path_factory.mktemp("tiny"))
        yield Bench(tiny=tiny, variables={**os.environ, "OMP_NUM_THREADS": "1", **variables})


def test_two_nodes_reach_the_losses_of_one_machine(bench):
    sections = {**LAYOUT, "loop": {"steps": 2}, "rollout": {"max_running": 1}}  # rounding depends on who decodes together
    job = bench.submit(bench.tiny.config("job", **sections))
    bench.wait(job, "job", "COMPLETED")
    tiny_run.train(bench.tiny.config("local", **sections))
    ours, wanted = bench.tiny.steps("job"), bench.tiny.steps("local")
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in wanted], rel=1e-4)
    assert [step["tokens"] for step in ours] == [step["tokens"] for step in wanted]
    assert "step 2" in bench.log("job") and "run summary" in bench.log("job")
    assert (bench.tiny.folder / "job" / "logs" / "learner-1.log").exists()


def test_a_killed_role_ends_the_job_with_its_name(bench):
    endless = {"loop": {"steps": 100_000, "batch": 4, "max_lag": 1}, "supervision": {"restarts": 0}}
    job = bench.submit(bench.tiny.config("kill", **LAYOUT, **endless))
    bench.wait_for_step(job, "kill", 2)
    bench.kill("kill", "teacher")
    killed = time.monotonic()
    bench.wait(job, "kill", "FAILED", timeout_s=60)
    assert time.monotonic() - killed < 30
    assert bench.log("kill").strip().splitlines()[-1].startswith("teacher-0 was killed by SIGKILL")
    ours = str(bench.tiny.folder / "kill" / "config.yaml")
    assert not [process for process in psutil.process_iter(["cmdline"]) if ours in (process.info["cmdline"] or [])], "orphans"


@pytest.mark.timeout(900)
def test_a_lost_replica_a_requeue_and_a_node_that_goes_down_end_in_a_finished_run(bench):
    """One job meets all three, and trains on every prompt once."""
    loop = {"loop": {"steps": STEPS, "batch": 4, "max_lag": 1}, "checkpoint": {"every_steps": 5}, "supervision": {"backoff_s": 0.1}}
    job = bench.submit(bench.tiny.config("hard", cluster=LAYOUT["cluster"], **loop))
    bench.wait_for_step(job, "hard", 2)
    bench.kill("hard", "rollout")
    made = len(bench.tiny.steps("hard"))
    bench.wait_for_step(job, "hard", made + 12)  # more than was under way: the replica came back
    assert "rollout-0 was killed by SIGKILL" in bench.log("hard") and "it is replaced (1 of 5 times)" in bench.log("hard")

    bench.run("scontrol", "requeue", job)
    bench.wait_requeued(job, "hard")
    bench.start_again(job)
    made = len(bench.tiny.steps("hard"))
    bench.wait_for_step(job, "hard", made + 2)

    bench.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    bench.wait_requeued(job, "hard")
    bench.wait_for_nodes()
    bench.start_again(job)
    made = len(bench.tiny.steps("hard"))
    assert made < STEPS, "the node went down after the last step; take more steps"
    bench.wait(job, "hard", "COMPLETED")
    assert [step["version"] for step in bench.tiny.steps("hard")] == list(range(1, STEPS + 1))
    assert "run summary" in bench.log("hard")
