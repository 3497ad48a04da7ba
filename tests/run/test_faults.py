"""What is not survived ends with one clear message, an exit code, nobody left behind, and what was finished on disk; what is, goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.run import tiny_run

pytestmark = pytest.mark.engines

LIMIT_S = 15.0  # from the fault to the end of the launcher
FATAL = {"supervision": {"restarts": 0, "disk_wait_s": 0}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("tiny"))


def endless(tiny, name, **sections):
    """A run that would go on for hours, two steps into it; the launcher and everything that it started."""
    loop = {"steps": 100_000, "batch": 4, "max_lag": 1}
    process = tiny_run.start(tiny.config(name, loop=loop, **sections))
    await_steps(tiny, name, process, 2)
    return process, psutil.Process(process.pid).children(recursive=True)


def await_steps(tiny, name, process, count):
    lines = Path(tiny.folder / name / "metrics.jsonl")
    deadline = time.monotonic() + 150
    while not lines.exists() or lines.read_text().count("\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


def role(children, name, index=0):
    return next(c for c in children if ["role", name] == c.cmdline()[3:5] and ["--index", str(index)] == c.cmdline()[6:8])


def assert_ends(process, children, message, code=1):
    start = time.monotonic()
    output, _ = process.communicate(timeout=60)
    took_s = time.monotonic() - start
    assert process.returncode == code, output
    assert message in output.splitlines()[-1], output
    assert "Traceback" not in output
    assert took_s < LIMIT_S
    _, alive = psutil.wait_procs(children, timeout=3)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE], "orphans"


def assert_steps_are_whole(tiny, name):
    steps = tiny.steps(name)
    assert [step["version"] for step in steps] == list(range(1, len(steps) + 1)) and len(steps) >= 2


@pytest.mark.parametrize("victim", ["controller", "learner", "rollout", "teacher"])
def test_a_killed_role_ends_the_run_by_name(tiny, victim):
    process, children = endless(tiny, f"kill-{victim}", **FATAL)
    role(children, victim).send_signal(signal.SIGKILL)
    assert_ends(process, children, f"{victim}-0 was killed by SIGKILL")
    assert_steps_are_whole(tiny, f"kill-{victim}")


def test_a_killed_engine_process_ends_the_run(tiny):
    process, children = endless(tiny, "kill-engine", **FATAL)
    grandchildren = [
        child for child in role(children, "rollout").children(recursive=True) if "resource_tracker" not in " ".join(child.cmdline())
    ]
    grandchildren[0].send_signal(signal.SIGKILL)
    assert_ends(process, children, "rollout")


def test_killed_rollouts_teachers_and_learner_ranks_are_replaced_and_a_request_to_stop_ends_the_run_in_order(tiny):
    name = "replaced"
    process, children = endless(tiny, name, supervision={"backoff_s": 0.1}, learner={"tensor_parallel": 2}, rollout={"piece_tokens": 5})
    for victim in [role(children, "rollout"), role(children, "teacher")]:  # both are looked up while both live
        victim.send_signal(signal.SIGKILL)
    await_steps(tiny, name, process, len(tiny.steps(name)) + 6)  # more than the store held
    role(children, "learner", 1).send_signal(signal.SIGKILL)
    await_steps(tiny, name, process, len(tiny.steps(name)) + 3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    for victim in ("rollout-0", "teacher-0", "learner-1"):
        assert f"{victim} was killed by SIGKILL (log: {tiny.folder / name}/logs/{victim}.log); it is replaced (1 of 5 times)" in output
    assert "go on with: megatron-opd train" in output.splitlines()[-1] and "Traceback" not in output
    assert not psutil.wait_procs(children, timeout=3)[1], "orphans"
    assert_steps_are_whole(tiny, name)
    steps = tiny.steps(name)
    assert [folder.name for folder in (tiny.folder / name / "checkpoints").iterdir()] == [f"step-{len(steps):08}"]
    assert [step["prompts"] for step in steps] == [[4 * i, 4 * i + 4] for i in range(len(steps))]
    assert max(int(lag) for step in steps for lag in step["lags"]) <= 1


def test_ctrl_c_ends_everything_and_keeps_what_was_finished(tiny):
    process, children = endless(tiny, "interrupt")
    process.send_signal(signal.SIGINT)
    assert_ends(process, children, "interrupted", code=130)
    assert_steps_are_whole(tiny, "interrupt")


def test_roles_do_not_outlive_a_killed_launcher(tiny):
    process, children = endless(tiny, "kill-launcher", checkpoint={"every_steps": 1})  # Megatron's writers have helpers of their own
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE], "orphans"


def test_a_full_disk_is_named(tiny):
    mount = tiny.folder / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        process, children = endless(tiny, "small/run", run={"dir": str(mount / "run")}, **FATAL)
        (mount / "filler").write_bytes(b"x" * (shutil.disk_usage(mount).free - 4096))
        try:
            (mount / "rest").write_bytes(b"x" * 8192)
        except OSError:
            pass
        assert_ends(process, children, "No space left on device")
        lines = (mount / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["version"] for line in lines[:2]] == [1, 2]
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def refused(tiny, name, message, **sections):
    """The run must end by itself and soon, with the message in its last line."""
    start = time.monotonic()
    process = tiny_run.start(tiny.config(name, **sections))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert message in output.splitlines()[-1], output
    assert "Traceback" not in output
    assert time.monotonic() - start < LIMIT_S


def test_a_bad_prompt_line_is_named(tiny):
    bad = tiny.folder / "bad.jsonl"
    bad.write_text('{"prompt": "w001"}\n{"prompt": \n')
    refused(tiny, "bad-prompt", f"{bad}:2: not valid JSON", data={"prompts": str(bad)})


def test_models_that_tokenize_differently_are_refused(tiny):
    other = tiny.folder / "other-tokens"
    shutil.copytree(tiny.teacher, other)
    tiny_run.write_tokenizer(str(other), first="zero")
    refused(tiny, "tokens", "tokenize differently: 'w000' is id 0", teacher={"path": str(other)})


def test_a_teacher_with_too_few_ids_is_refused(tiny):
    other = tiny.folder / "few-ids"
    shutil.copytree(tiny.teacher, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    refused(tiny, "vocabulary", "vocab_size=507 exceeds the teacher's 500", teacher={"path": str(other)})


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused(tiny):
    refused(tiny, "heads", "tensor_parallel=4 does not divide num_attention_heads=6; use 1, 2, 3 or 6", learner={"tensor_parallel": 4})


def test_missing_weights_are_named(tiny):
    other = tiny.folder / "no-weights"
    shutil.copytree(tiny.student, other)
    os.remove(other / "model.safetensors")
    refused(tiny, "weights", str(other), student={"path": str(other)})


def test_a_busy_port_is_named(tiny):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(tiny, "port", f"run.port={port} cannot be bound", run={"port": port})


def test_a_directory_with_a_run_in_it_is_not_overwritten(tiny):
    (tiny.folder / "old").mkdir()
    (tiny.folder / "old" / "metrics.jsonl").write_text("{}\n")
    refused(tiny, "old", "is not empty; name a new directory")


def test_a_directory_in_which_no_step_was_made_is_used_again(tiny):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for _ in range(2):
            refused(tiny, "twice", f"run.port={port} cannot be bound", run={"port": port})
            assert (tiny.folder / "twice" / "config.yaml").exists()
