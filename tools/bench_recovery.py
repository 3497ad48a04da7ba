"""What it costs to lose nothing. Two CPU cores, about two minutes.

    python tools/bench_recovery.py --json FILE

- checkpoint: the learner's step (the demo's student and batch, supervised) with a checkpoint every ten steps, written by a forked
  process while the next step goes on, against ten steps without, in turn. Beginning, finishing, syncing and renaming are counted.
- journal: putting down a batch of rollouts and scores (top 64 of the teacher) and syncing it, as the controller does once a step,
  against the same step.

JSON: {"checkpoint_step_ratio": x, "checkpoint_bytes": n, "step_seconds": s, "journal_share_of_step": x, "journal_bytes": n}
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_opd.config import CheckpointConfig, LearnerConfig
from megatron_opd.runtime.environment import environment
from megatron_opd.store.checkpoints import Checkpoints
from megatron_opd.store.journal import Journal
from megatron_opd.types import GuardState, Rollout, RunState, Segment, TeacherScores, Trajectory

STUDENT = "examples/arithmetic/models/student"
SEQUENCES, PROMPT_TOKENS, RESPONSE_TOKENS, TOP_K = 128, 12, 48, 64
EVERY, BLOCKS = 10, 3


def main() -> None:
    """Measures both in a process that is thrown away, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    os.environ.update(environment("cpu"))
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sending,))
    process.start()
    sending.close()
    try:
        if not receiving.poll(600):
            raise TimeoutError("no figures within 600 s")
        figures = json.loads(receiving.recv_bytes())
    finally:
        process.join(30)
        if process.is_alive():
            process.kill()
    table = Table("figure", "value", title="what it costs to lose nothing")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def trajectories() -> list[Trajectory]:
    """A batch of the demo's shape."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(SEQUENCES):
        rollout = Rollout(
            index=index,
            prompt_ids=rng.integers(6, 101, PROMPT_TOKENS).astype(np.int32),
            response_ids=rng.integers(6, 101, RESPONSE_TOKENS).astype(np.int32),
            segments=(Segment(first_token=0, version=0),),
            finish_reason="stop",
        )
        ids = np.argsort(rng.random((RESPONSE_TOKENS, 101)), 1)[:, :TOP_K].astype(np.int32)
        logp = -rng.random((RESPONSE_TOKENS, TOP_K)).astype(np.float32) - 5
        made.append(Trajectory(rollout=rollout, teacher=TeacherScores(index=index, top_ids=ids, top_logp=logp)))
    return made


def _measure(sending: "multiprocessing.connection.Connection") -> None:
    with tempfile.TemporaryDirectory() as folder:
        batch = trajectories()
        figures = checkpoint_cost(Path(folder), [Trajectory(rollout=one.rollout, teacher=None) for one in batch])
        seconds, size = journal_cost(Path(folder), batch)
        figures |= {"journal_share_of_step": seconds / figures["step_seconds"], "journal_bytes": size}
        sending.send_bytes(json.dumps(figures).encode())


def checkpoint_cost(folder: Path, batch: list[Trajectory]) -> dict:
    """Blocks of ten steps with one checkpoint, and without, in turn."""
    from megatron_opd.estimators import build
    from megatron_opd.learner.learner import Learner, StudentModel
    from megatron_opd.preflight import load_hf_config
    from megatron_opd.runtime.collective import Ranks

    ranks = Ranks.connect(file=folder / "store.json", rank=0, world_size=1, host="127.0.0.1", device="cpu", timeout_s=60)
    student = StudentModel(path=STUDENT, hf_config=load_hf_config(STUDENT), steps=1000, seed=0, device="cpu")
    learner = Learner(student, LearnerConfig(micro_batch_tokens=8192), build("sft", {}), ranks)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())

    def block(saves: bool) -> float:
        start = time.perf_counter()
        for number in range(EVERY):
            learner.train(batch)
            if saves and number == 0:
                version = learner.version
                learner.save(str(checkpoints.begin(version)))
            if saves and number == 1:
                learner.finish_save()
                checkpoints.describe(_state(version))
                checkpoints.commit(version)
        return time.perf_counter() - start

    block(saves=True)  # the writer's helper process starts once
    pairs = [(block(saves=False), block(saves=True)) for _ in range(BLOCKS)]
    return {
        "checkpoint_step_ratio": statistics.median(with_one / without for without, with_one in pairs),
        "checkpoint_bytes": checkpoints.size(),
        "step_seconds": statistics.median(without for without, _ in pairs) / EVERY,
    }


def _state(version: int) -> RunState:
    return RunState(
        version=version, prompts=0, metrics_bytes=0, settings="", tokens=0, wall_seconds=0.0, lag_histogram={}, seconds_by_stage={},
        busy_seconds={}, guard=GuardState(),
    )  # fmt: skip


def journal_cost(folder: Path, batch: list[Trajectory]) -> tuple[float, int]:
    """(seconds to put down one batch and sync it, its bytes)."""
    seconds = []
    for attempt in range(10):
        journal = Journal(folder / f"journal-{attempt}", batch=SEQUENCES)
        start = time.perf_counter()
        for one in batch:
            journal.add(one.rollout)
            assert one.teacher is not None
            journal.add(one.teacher)
        journal.sync(1)
        seconds.append(time.perf_counter() - start)
        size = sum(file.stat().st_size for file in (folder / f"journal-{attempt}").iterdir())
        journal.close()
    return statistics.median(seconds), size


if __name__ == "__main__":
    main()
