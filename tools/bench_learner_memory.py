"""How much memory a learner needs with the fused doors, against logits of a whole micro-batch in plain autograd.

    python tools/bench_learner_memory.py --json FILE       # one CPU core, 12 GB, 2 minutes; models of the examples must be there

Each side is one learner of an example's own config in a fresh process that takes two steps of two micro-batches of random tokens; what
is shown is its largest resident set. "fused" is `learner.kernels=chunked`, "materialised" is `learner.kernels=reference`, which holds the
logits of the micro-batch as anybody's loss on full logits does. Estimators: `sft`, which goes through `logps`, and `dense_kl`.

JSON: {EXAMPLE: {ESTIMATOR: {"fused": bytes, "materialised": bytes, "before": bytes}}}; "before" is the learner before its first step.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_opd.config import Config, EstimatorConfig, TeacherConfig, load
from megatron_opd.runtime.environment import environment
from megatron_opd.types import Rollout, Segment, TeacherScores, Trajectory

SIDES = {"fused": "chunked", "materialised": "reference"}
PROMPT_TOKENS, RESPONSE_TOKENS, MICRO_BATCHES = 32, 96, 2
LIMIT_S = 300


def main() -> None:
    """Runs every side and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--arithmetic", type=Path, default=Path("examples/arithmetic"), help="folder with models/")
    parser.add_argument("--smollm2", type=Path, default=Path("examples/smollm2"), help="the same of that example")
    arguments = parser.parse_args()
    os.environ.update(environment("cpu"))
    figures: dict = {}
    table = Table(
        "example", "estimator", "before the first step, MB", "fused, MB", "materialised, MB", "the steps' own: fused over materialised"
    )
    for example in ("arithmetic", "smollm2"):
        for estimator in ("sft", "dense_kl"):
            of = {side: alone(example, estimator, kernels, getattr(arguments, example)) for side, kernels in SIDES.items()}
            before = of["fused"][0]
            figures.setdefault(example, {})[estimator] = {"before": before} | {side: peak for side, (_, peak) in of.items()}
            own = [peak - start for start, peak in of.values()]
            cells = (before, *(peak for _, peak in of.values()))
            table.add_row(example, estimator, *(f"{cell / 1e6:.0f}" for cell in cells), f"{own[0] / own[1]:.2f}")
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def alone(example: str, estimator: str, kernels: str, folder: Path) -> tuple[int, int]:
    """Bytes before the first step and at the peak, of a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_learn, args=(settings(example, estimator, kernels, folder), sending))
    process.start()
    sending.close()
    try:
        if not receiving.poll(LIMIT_S):
            raise TimeoutError(f"{example} {estimator} {kernels} did not end within {LIMIT_S} s")
        return receiving.recv()
    finally:
        process.join(30)
        if process.is_alive():
            process.kill()


def settings(example: str, estimator: str, kernels: str, folder: Path) -> Config:
    """The example's own, but for estimator, kernels and where its models are."""
    given = load(Path("examples", example, "config.yaml"), [f"student.path={folder}/models/student", f"learner.kernels={kernels}"])
    teacher = TeacherConfig(backend="none") if estimator == "sft" else replace(given.teacher, path=f"{folder}/models/teacher")
    return replace(given, estimator=EstimatorConfig(name=estimator), teacher=teacher)


def _learn(config: Config, sending: "multiprocessing.connection.Connection") -> None:
    """Two steps."""
    from megatron_opd.learner.learner import Learner, StudentModel, TeacherHead
    from megatron_opd.preflight import build_estimator, load_hf_config
    from megatron_opd.runtime.collective import Ranks

    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks.connect(file=Path(folder, "store.json"), rank=0, world_size=1, host="127.0.0.1", device="cpu", timeout_s=60)
    hf_config, teacher = load_hf_config(config.student.path), None
    if config.teacher.backend != "none":
        teacher = TeacherHead(path=config.teacher.path, hf_config=load_hf_config(config.teacher.path), dtype=config.teacher.dtype)
    student = StudentModel(path=config.student.path, hf_config=hf_config, steps=100, seed=0, device="cpu", teacher=teacher)
    learner = Learner(student, config.learner, build_estimator(config), ranks)
    batch = trajectories(config, hf_config.vocab_size, teacher.hf_config.hidden_size if teacher else 0)
    before = peak()
    for _ in range(2):
        learner.train(batch)
    sending.send((before, peak()))


def trajectories(config: Config, vocabulary: int, teacher_hidden: int) -> list[Trajectory]:
    """Two micro-batches of random tokens, and hidden states of the teacher if it has any."""
    rng = np.random.default_rng(0)
    count = MICRO_BATCHES * config.learner.micro_batch_tokens // (PROMPT_TOKENS + RESPONSE_TOKENS)
    found = []
    for index in range(count):
        prompt, response = (rng.integers(vocabulary, size=size).astype(np.int32) for size in (PROMPT_TOKENS, RESPONSE_TOKENS))
        segments = (Segment(first_token=0, version=0),)
        rollout = Rollout(index=index, prompt_ids=prompt, response_ids=response, segments=segments, finish_reason="stop")
        hidden = rng.normal(size=(RESPONSE_TOKENS, teacher_hidden)).astype(np.float32)
        if config.teacher.dtype == "bfloat16":
            hidden = (hidden.view(np.uint32) >> 16).astype(np.uint16)  # its bits
        teacher = TeacherScores(index=index, hidden=hidden) if teacher_hidden else None
        found.append(Trajectory(rollout=rollout, teacher=teacher))
    return found


def peak() -> int:
    """The largest resident set so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
