"""What asynchrony buys, and what our loop costs over the bare engines. Two CPU cores, about 20 minutes (--quick: 4).

    python tools/bench_loop.py --json FILE [key=value ...]     # settings of the loop, e.g. rollout.max_running=8

Asynchrony hides the shorter of two things behind the longer one: rollout behind learner and teacher, or the other way. The
closer their times, the more it gains, so the ratio belongs to a workload and a placement.

Everything is measured in this run, on the demo's models, side by side:

- the loop: `megatron-opd train` with max_lag 0, 2 and 4 in turn, seed by seed; rollout pinned to core 0, learner and
  teacher to core 1; same prompts, same number of steps. Throughput is response tokens per wall second of the loop.
- rollout: our rollout backend against bare vLLM (`LLM.generate` in one process), same prompts and same settings, every
  response 128 tokens long (the end-of-sequence id is one that the model never says). Ours has its front end in a second
  process, so both sides run once with the machine's cores free to use and once squeezed onto core 0.
- learner: a step of our learner (packing, estimator, reports) against a bare Megatron loop on the same packed
  micro-batches: same GPTModel, same optimizer, Megatron's own vocabulary-parallel cross-entropy over materialised logits.
- weight update: seconds by part, from the loop's own accounts.

JSON: {"async_over_sync": {"2": x, "4": x}, "rollout_over_vllm": x, "rollout_over_vllm_on_one_core": x,
"learner_over_megatron": x, "update_seconds": {part: s},
"tokens_per_second": {lag: [per seed]}, "overlap": {lag: [per seed]}, "final_kl": {lag: [per seed]}}
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_opd.config import LearnerConfig, RolloutConfig
from megatron_opd.runtime.environment import environment
from megatron_opd.types import Needs, Prompt, Rollout, Segment, Trajectory

EXAMPLE = Path("examples/arithmetic")
STUDENT = EXAMPLE / "models" / "student"
LAGS = (0, 2, 4)
PROMPT_TOKENS, RESPONSE_TOKENS, SEQUENCES = 12, 128, 128


def main() -> None:
    """Runs the four comparisons and prints them as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run of the loop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the loop beside the demo's own")
    parser.add_argument("--engines-only", action="store_true", help="leave the loop out")
    parser.add_argument("--quick", action="store_true", help="1 seed, 15 steps: to see that it works, not to quote")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps = 1, 15
    os.environ.update(environment("cpu"))
    subprocess.run([EXAMPLE / "prepare.sh"], check=True)
    figures = {} if arguments.engines_only else compare_loops(arguments.seeds, arguments.steps, arguments.overrides)
    figures |= compare("rollout_over_vllm", "tokens/s", our_rollout, bare_vllm, cores={0, 1})
    figures |= compare("rollout_over_vllm_on_one_core", "tokens/s", our_rollout, bare_vllm, cores={0})
    figures |= compare("learner_over_megatron", "s/step", our_learner, bare_megatron, cores={1})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


# --------------------------------------------------------------------------------------------------------- the loop
def compare_loops(seeds: int, steps: int, overrides: list[str]) -> dict:
    """The loop at each lag, lags in turn within a seed so that drift of the machine hits all alike."""
    runs: dict[int, list[dict]] = {lag: [] for lag in LAGS}
    for seed in range(seeds):
        for lag in LAGS:
            runs[lag].append(one_loop(seed, lag, steps, overrides))
    speed = {lag: [run["tokens_per_second"] for run in runs[lag]] for lag in LAGS}
    table = Table(
        "max_lag",
        "tokens/s (each seed)",
        "over max_lag 0 (median)",
        "overlap",
        "final KL (each seed)",
        title=f"loop, {steps} steps {' '.join(overrides)}",
    )
    ratios = {lag: statistics.median(a / s for a, s in zip(speed[lag], speed[0])) for lag in LAGS}
    for lag in LAGS:
        overlap = statistics.median(run["overlap"] for run in runs[lag])
        table.add_row(
            str(lag), _list(speed[lag], ".0f"), f"{ratios[lag]:.2f}", f"{overlap:.2f}", _list([r["kl"] for r in runs[lag]], ".4f")
        )
    Console(width=150).print(table)
    updates = [run["update_seconds"] for lag in LAGS for run in runs[lag]]
    update = {part: statistics.median(one[part] for one in updates) for part in updates[0]}
    Console(width=150).print("seconds of a weight update by part:", {part: round(s, 4) for part, s in update.items()})
    return {
        "async_over_sync": {str(lag): ratios[lag] for lag in LAGS if lag},
        "update_seconds": update,
        "tokens_per_second": {str(lag): speed[lag] for lag in LAGS},
        "overlap": {str(lag): [run["overlap"] for run in runs[lag]] for lag in LAGS},
        "final_kl": {str(lag): [run["kl"] for run in runs[lag]] for lag in LAGS},
    }


def one_loop(seed: int, lag: int, steps: int, overrides: list[str]) -> dict:
    """One run of the product; KL is the mean over the last quarter of its steps, on prompts never seen before."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.dir": f"{folder}/run", "run.seed": seed, "loop.max_lag": lag, "loop.steps": steps,
            "eval.prompts": "", "eval.verifier": "",
            "rollout.cores": "[0]", "learner.cores": "[1]", "teacher.cores": "[1]",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "megatron_opd",
            "train",
            str(EXAMPLE / "config.yaml"),
            *(f"{k}={v}" for k, v in settings.items()),
            *overrides,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    last = lines[-max(1, steps // 4) :]
    parts = {name.removeprefix("publish."): s / steps for name, s in summary["seconds_by_stage"].items() if name.startswith("publish")}
    return summary | {"kl": statistics.mean(line["diagnostics"]["kl"] for line in last), "update_seconds": parts}


# ------------------------------------------------------------------------------------------------- against the engines
def compare(name: str, unit: str, ours: Callable[[], float], bare: Callable[[], float], *, cores: set[int]) -> dict:
    """Both sides in turn, three times, each in a fresh process on those cores."""
    figures = [(alone(ours, cores), alone(bare, cores)) for _ in range(3)]
    ratio = statistics.median(a / b for a, b in figures)
    table = Table("side", f"{unit} (each repeat)", title=f"{name} = {ratio:.3f}")
    table.add_row(ours.__name__.replace("_", " "), _list([a for a, _ in figures], ".4g"))
    table.add_row(bare.__name__.replace("_", " "), _list([b for _, b in figures], ".4g"))
    Console(width=150).print(table)
    return {name: ratio}


def alone(measure: Callable[[], float], cores: set[int]) -> float:
    """`measure()` in a process of its own, pinned."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_pinned, args=(measure, cores, sending))
    process.start()
    sending.close()
    try:
        if not receiving.poll(300):
            raise TimeoutError(f"{measure.__name__} gave no figure within 300 s")
        return float(receiving.recv_bytes())
    finally:
        process.join(30)
        if process.is_alive():
            process.kill()


def _pinned(measure: Callable[[], float], cores: set[int], sending: "multiprocessing.connection.Connection") -> None:
    os.sched_setaffinity(0, cores)
    sending.send_bytes(str(measure()).encode())


def prompts() -> list[Prompt]:
    """The same prompts for everyone."""
    rng = np.random.default_rng(0)
    return [Prompt(index=i, token_ids=rng.integers(6, 101, PROMPT_TOKENS).astype(np.int32)) for i in range(SEQUENCES)]


ROLLOUT = RolloutConfig(max_response_tokens=RESPONSE_TOKENS, max_running=64, kv_cache_bytes=64 << 20)


def endless_student(folder: str) -> str:
    """The demo's student with another end-of-sequence id, so that all responses have the same length."""
    path = shutil.copytree(STUDENT, Path(folder, "student"))
    for name in ("config.json", "generation_config.json"):
        if (path / name).exists():
            (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | {"eos_token_id": 2}))
    return str(path)


def our_rollout() -> float:
    """Tokens per second of the rollout backend, behaviour log-probabilities included, second of two rounds."""
    from megatron_opd.rollout.engine import EngineSettings, VLLMRollout

    async def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            path, length = endless_student(folder), PROMPT_TOKENS + RESPONSE_TOKENS
            settings = EngineSettings(rollout=ROLLOUT, path=path, needs=Needs(behaviour_logp=True), max_model_len=length)
            engine = await VLLMRollout.start(settings)
        for _ in range(2):
            start = time.perf_counter()
            rollouts = await asyncio.gather(*(engine.generate(prompt) for prompt in prompts()))
            rate = sum(len(r.response_ids) for r in rollouts) / (time.perf_counter() - start)
        await engine.close()
        return rate

    return asyncio.run(run())


def bare_vllm() -> float:
    """Tokens per second of `LLM.generate`, the sampled token's log-probability included, second of two rounds."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from megatron_opd.rollout.engine import end_ids

    with tempfile.TemporaryDirectory() as folder:
        path, length = endless_student(folder), PROMPT_TOKENS + RESPONSE_TOKENS
        llm = LLM(
            model=path, skip_tokenizer_init=True, dtype=ROLLOUT.dtype, enforce_eager=True, max_model_len=length,
            max_num_seqs=ROLLOUT.max_running, kv_cache_memory_bytes=ROLLOUT.kv_cache_bytes, generation_config="vllm",
            logprobs_mode="processed_logprobs",
        )  # fmt: skip
        params = SamplingParams(max_tokens=RESPONSE_TOKENS, stop_token_ids=list(end_ids(path)), logprobs=0, detokenize=False)
    for _ in range(2):
        start = time.perf_counter()
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p.token_ids.tolist()) for p in prompts()], params, use_tqdm=False)
        rate = sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start)
    return rate


STEPS = 8
LEARNER = LearnerConfig(micro_batch_tokens=4096)


def trajectories() -> list[Trajectory]:
    """Supervised ones: what both sides can train on."""
    rng = np.random.default_rng(1)
    rollouts = [
        Rollout(
            index=p.index,
            prompt_ids=p.token_ids,
            response_ids=rng.integers(6, 101, RESPONSE_TOKENS).astype(np.int32),
            segments=(Segment(first_token=0, version=0),),
            finish_reason="stop",
        )
        for p in prompts()
    ]
    return [Trajectory(rollout=rollout, teacher=None) for rollout in rollouts]


def connect() -> "Ranks":  # noqa: F821 - Megatron and torch are imported only in the processes that are measured
    """A world of one rank."""
    from megatron_opd.runtime.collective import Ranks

    with tempfile.TemporaryDirectory() as folder:
        return Ranks.connect(file=Path(folder, "store.json"), rank=0, world_size=1, host="127.0.0.1", device="cpu", timeout_s=60)


def our_learner() -> float:
    """Median seconds of `Learner.train`."""
    from megatron_opd.estimators import build
    from megatron_opd.learner.learner import Learner, StudentModel
    from megatron_opd.preflight import load_hf_config

    student = StudentModel(path=str(STUDENT), hf_config=load_hf_config(str(STUDENT)), steps=100, seed=0, device="cpu")
    learner, batch = Learner(student, LEARNER, build("sft", {}), connect()), trajectories()
    return _median_seconds(lambda: learner.train(batch))


def bare_megatron() -> float:
    """Median seconds of forward, backward and optimizer step in a loop as Megatron's users write it."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_opd.data.packing import pack, plan
    from megatron_opd.learner import optimizer as optimizers
    from megatron_opd.model import build, convert, forward, parallel
    from megatron_opd.preflight import load_hf_config

    connect()
    hf_config = load_hf_config(str(STUDENT))
    split = parallel.ParallelConfig()
    parallel.initialize(split, device="cpu", seed=0)
    model = build.build(hf_config, split, dtype=torch.float32)
    del model.output_layer.forward  # back to Megatron's own head, which returns logits
    convert.load_hf(model, STUDENT, hf_config, split)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = optimizers.wrap(model)
    optimizer, schedule = optimizers.build(LEARNER.optimizer, wrapped, dtype=torch.float32, steps=100)
    samples = trajectories()
    lengths = [PROMPT_TOKENS + RESPONSE_TOKENS - 1] * len(samples)
    batches = [pack([samples[i] for i in group], Needs(generation=False)) for group in plan(lengths, ranks=1, micro_batch_tokens=4096)[0]]

    def step(iterator: "Iterator", wrapped: torch.nn.Module) -> tuple:  # noqa: F821
        batch = next(iterator)
        logits = wrapped(batch.token_ids[None], batch.positions[None], None, packed_seq_params=forward.packed(batch.boundaries))

        def loss(logits: torch.Tensor) -> tuple:
            nll = tensor_parallel.vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous().float(), batch.token.ids)
            total = (nll[:, 0] * batch.mask).sum()
            return total, batch.mask.sum().int(), {"loss": total.detach().clone()}

        return logits, loss

    def train() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter(batches), model=[wrapped], num_microbatches=len(batches),
            seq_length=4096, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        schedule.step(increment=1)
        optimizer.step()

    return _median_seconds(train)


def _median_seconds(action: Callable[[], object]) -> float:
    action()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _list(values: list[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


if __name__ == "__main__":
    main()
