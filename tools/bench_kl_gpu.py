"""What the doors cost on a GPU, over the floor that its datasheet sets. NOT RUN YET: no GPU was at hand when it was written.

    python tools/bench_kl_gpu.py --arithmetic                              # the floors alone, on any machine
    python tools/bench_kl_gpu.py --json FILE                               # one GPU does one rank's share, without collectives
    torchrun --nproc-per-node 8 tools/bench_kl_gpu.py --json FILE          # tensor parallel over all, with them

Hopper or later, 40 GB free, a few minutes. Each implementation runs `dense_kl` (forward KL) and `logps` (64 ids, one rest), forward and
backward, in bfloat16; times are medians of CUDA events, memory the peak over the inputs. An implementation that the machine cannot run is
named with its reason.

The floor is arithmetic: the larger of the products' time at the datasheet's dense rate and of reading each input once, adding to main_grad
once and writing the hidden states' gradient once. JSON: {CASE: {WAY: {"seconds", "floor_seconds", "over_floor", "tflops", "bytes"}}}.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_opd.errors import ConfigError
from megatron_opd.kernels import Upstream, dense_kl, fp8_products, logps
from megatron_opd.types import Divergence, VocabShard

CONSOLE = Console(width=140)
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Dense rates of a datasheet."""

    name: str  # part of what CUDA calls it
    bf16: float  # FLOP/s
    fp8: float  # FLOP/s
    memory: float  # bytes/s
    link: float  # bytes/s, NVLink in one direction


CHIPS = (
    Chip(name="H100", bf16=989e12, fp8=1979e12, memory=3.35e12, link=450e9),
    Chip(name="B200", bf16=2250e12, fp8=4500e12, memory=8.0e12, link=900e9),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one rank has."""

    tokens: int
    hidden: int
    teacher_hidden: int
    vocabulary: int
    ranks: int
    ids: int = 64

    def __str__(self) -> str:
        return f"T {self.tokens}, D {self.hidden}, D' {self.teacher_hidden}, V {self.vocabulary}, p {self.ranks}"

    @property
    def rows(self) -> int:
        """Of the vocabulary, on a rank."""
        return -(-self.vocabulary // (128 * self.ranks)) * 128


CASES = (
    Case(tokens=8192, hidden=4096, teacher_hidden=5120, vocabulary=151_936, ranks=8),
    Case(tokens=8192, hidden=2048, teacher_hidden=4096, vocabulary=151_936, ranks=2),
    Case(tokens=32_768, hidden=4096, teacher_hidden=5120, vocabulary=151_936, ranks=8),
    Case(tokens=8192, hidden=4096, teacher_hidden=8192, vocabulary=128_256, ranks=8),
    Case(tokens=4096, hidden=1024, teacher_hidden=1024, vocabulary=151_936, ranks=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least that a rank must do."""

    logits: float  # FLOP of products that make logits
    gradients: float  # FLOP of products that make gradients
    bytes: float
    gathered: float  # bytes per rank of what tokens tell each other
    reduced: float  # bytes of the hidden states' gradient, float32

    def seconds(self, chip: Chip, *, fp8_gradients: bool = False) -> float:
        """The longer of multiplying and moving."""
        return max(self.logits / chip.bf16 + self.gradients / (chip.fp8 if fp8_gradients else chip.bf16), self.bytes / chip.memory)

    def link_seconds(self, chip: Chip, ranks: int) -> float:
        """Of the collectives by rings, none of it hidden behind products."""
        ring = (ranks - 1) / ranks
        return (self.gathered * (ranks - 1) + 2 * ring * self.reduced) / chip.link


def work(case: Case, door: str, schedule: str) -> Work:
    """`dense_kl` in either schedule, `logps` in the one that it has."""
    T, D, E, v = case.tokens, case.hidden, case.teacher_hidden if door == "dense_kl" else 0, case.rows
    times = 1 if schedule == "forward" else 2
    return Work(
        logits=times * 2.0 * T * v * (D + E),
        gradients=4.0 * T * v * D,
        bytes=2.0 * (T + v) * (D + E) * times + 4.0 * T * D + 8.0 * v * D,
        gathered=T * (10 if door == "dense_kl" else case.ids + 3) * 4.0,
        reduced=T * D * 4.0,
    )


# ---------------------------------------------------------------------------------------------------------- arithmetic
def arithmetic() -> None:
    """Floors of all cases for all chips."""
    columns = ["case", "door", "schedule", "TFLOP", "GB", *(f"{c.name} ms" for c in CHIPS), *(f"{c.name} ms, FP8 grads" for c in CHIPS)]
    table = Table(*columns, *(f"{c.name} links ms" for c in CHIPS), title="arithmetic, not measurement: one rank, forward and backward")
    for case in CASES:
        for door, schedule in (("dense_kl", "forward"), ("dense_kl", "recompute"), ("logps", "recompute")):
            of = work(case, door, schedule)
            table.add_row(
                str(case), door, schedule, f"{(of.logits + of.gradients) / 1e12:.2f}", f"{of.bytes / 1e9:.2f}",
                *(f"{of.seconds(chip) * 1e3:.2f}" for chip in CHIPS),
                *(f"{of.seconds(chip, fp8_gradients=True) * 1e3:.2f}" for chip in CHIPS),
                *(f"{of.link_seconds(chip, case.ranks) * 1e3:.2f}" for chip in CHIPS),
            )  # fmt: skip
    CONSOLE.print(table)


# --------------------------------------------------------------------------------------------------------- measurement
class Inputs:
    """One rank's tensors."""

    def __init__(self, case: Case, shard: VocabShard, device: str = "cuda") -> None:
        rows = shard.stop - shard.start
        g = torch.Generator(device).manual_seed(0)

        def normal(count: int, width: int, scale: float) -> torch.Tensor:
            return torch.randn(count, width, generator=g, device=device, dtype=torch.bfloat16).mul_(scale)

        self.shard = shard
        self.hidden = normal(case.tokens, case.hidden, 1.0).requires_grad_()
        self.head = torch.nn.Parameter(normal(rows, case.hidden, 3 / case.hidden**0.5))
        self.teacher = normal(case.tokens, case.teacher_hidden, 1.0), normal(rows, case.teacher_hidden, 3 / case.teacher_hidden**0.5)
        self.head.main_grad, self.head.grad_added_to_main_grad = torch.zeros_like(self.head, dtype=torch.float32), False
        self.ids = torch.randint(case.vocabulary, (case.tokens, case.ids), generator=g, device=device)


def ways() -> dict[str, tuple[str, str, bool, Callable[[Inputs], torch.Tensor]]]:
    """Name -> door, schedule, whether gradients are FP8, and the loss."""
    found: dict[str, tuple[str, str, bool, Callable[[Inputs], torch.Tensor]]] = {}
    kinds = [
        ("chunked", None),
        ("triton", None),
        *(("te", (policy, "current")) for policy in ("bf16", "fp8x2", "fp8")),
        ("te", ("bf16", "mxfp8")),
    ]
    for implementation, fp8 in kinds:
        name = " ".join([implementation, *(fp8 or ())])
        for schedule in ("forward", "recompute") if implementation != "triton" else ("recompute",):
            found[f"dense_kl {name} {schedule}"] = "dense_kl", schedule, bool(fp8), dense(implementation, fp8, schedule)
        found[f"logps {name}"] = "logps", "recompute", bool(fp8), at_ids(implementation, fp8)
    return found


def options(implementation: str, fp8: tuple | None) -> dict:
    """Of either door."""
    return {"implementation": implementation} | ({"products": fp8_products(*fp8, "cuda")} if fp8 else {})


def dense(implementation: str, fp8: tuple | None, schedule: str) -> Callable[[Inputs], torch.Tensor]:
    """The loss of a divergence."""
    upstream = Upstream()

    def loss(inputs: Inputs) -> torch.Tensor:
        way = options(implementation, fp8) | {"schedule": schedule, "upstream": upstream}
        return dense_kl(inputs.hidden, inputs.head, *inputs.teacher, inputs.shard, Divergence(kind="forward"), **way).divergence.sum()

    return loss


def at_ids(implementation: str, fp8: tuple | None) -> Callable[[Inputs], torch.Tensor]:
    """The loss of log-probabilities and one rest."""

    def loss(inputs: Inputs) -> torch.Tensor:
        every = slice(0, inputs.ids.shape[1])
        found = logps(inputs.hidden, inputs.head, inputs.ids, inputs.shard, rests=[every], **options(implementation, fp8))
        return found.logp.sum() + found.log_rest.sum()

    return loss


def measure(inputs: Inputs, loss: Callable[[Inputs], torch.Tensor], repeats: int) -> tuple[float, int]:
    """Median seconds of forward and backward, and peak bytes over the inputs."""
    before, seconds = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 2):
        inputs.hidden.grad, inputs.head.grad, inputs.head.grad_added_to_main_grad = None, None, False
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(inputs).backward()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[2:]), torch.cuda.max_memory_allocated() - before


def run(case: Case, chip: Chip, shard: VocabShard, repeats: int) -> dict:
    """Every way of one case."""
    figures, inputs = {}, Inputs(case, shard)
    table = Table("way", "ms", "floor ms", "over floor", "TFLOP/s", "extra MiB", title=f"{case} on {torch.cuda.get_device_name()}")
    for name, (door, schedule, fp8, loss) in ways().items():
        try:
            seconds, peak = measure(inputs, loss, repeats)
        except (ConfigError, ImportError, torch.OutOfMemoryError) as error:
            CONSOLE.print(f"[bold red]SKIPPED {name}: {error}")
            continue
        of = work(case, door, schedule)
        floor = of.seconds(chip, fp8_gradients=fp8)
        rate = (of.logits + of.gradients) / seconds / 1e12
        figures[name] = {"seconds": seconds, "floor_seconds": floor, "over_floor": seconds / floor, "tflops": rate, "bytes": peak}
        ms, floor_ms = f"{seconds * 1e3:.2f}", f"{floor * 1e3:.2f}"
        table.add_row(name, ms, floor_ms, f"{seconds / floor:.2f}", f"{rate:.0f}", f"{peak / MIB:.0f}")
    CONSOLE.print(table)
    return figures


def main() -> None:
    """Arithmetic, or all cases on the GPUs at hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arithmetic", action="store_true", help="print the floors and stop")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.arithmetic:
        arithmetic()
        return
    if not torch.cuda.is_available():
        parser.error("no GPU is at hand; --arithmetic prints the floors alone")
    name = torch.cuda.get_device_name()
    chip = next((chip for chip in CHIPS if chip.name in name), None)
    if chip is None:
        parser.error(f"{name} has no datasheet here; add one to CHIPS")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    group = None
    if world > 1:
        dist.init_process_group("nccl")
        group = dist.group.WORLD
    figures = {}
    for case in CASES:
        if world not in (1, case.ranks):
            CONSOLE.print(f"{case} wants {case.ranks} ranks, there are {world}")
            continue
        place = rank if world > 1 else 0
        vocabulary = case.vocabulary if world > 1 else min(case.rows, case.vocabulary)
        shard = VocabShard(start=place * case.rows, stop=(place + 1) * case.rows, vocab_size=vocabulary, group=group)
        figures[str(case)] = run(case, chip, shard, arguments.repeats)
        torch.cuda.empty_cache()
    if arguments.json and rank == 0:
        arguments.json.write_text(json.dumps(figures, indent=1))
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
