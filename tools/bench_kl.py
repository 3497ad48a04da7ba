"""What a divergence over the whole vocabulary costs, beside its bare matrix products and other implementations.

    python tools/bench_kl.py --json FILE           # one CPU core with bf16 matrix units, 24 GB, about 15 minutes (--quick: 1)
    python tools/bench_kl.py --peers FOLDER ...    # with packages unpacked there: pip install --no-deps --target FOLDER
                                                   # liger-kernel cut-cross-entropy trl

Loss, forward and backward, in bfloat16 at hidden size 1024, for both vocabularies of 151,936 and 32,000. Each side runs in
a fresh process on one thread. Its time is the CPU seconds of that thread, the least of the repeats; its memory the growth
of the largest resident set over the inputs. To these belongs the float32 buffer where Megatron adds up the head's gradient
(main_grad), which every side has to fill.

- naive: the loss as Megatron's users write it: float32 logits of both models, log_softmax, KL(q||p), autograd.
- trl: the body of `generalized_jsd_loss` (beta 0.5) of TRL's source on float32 logits, as its trainer calls it.
- liger: `LigerFusedLinearJSDLoss` (beta 0.5), chunks of 1024 tokens; compiled where a C++ compiler is found.
- cce: ml-cross-entropy's path for machines without Triton (`torch_compile`); a cross-entropy, so it has only the student's
  products: beside `logps`, not beside the divergences.
- floor: the bare products, in chunks of 512 tokens, results thrown away: 4 for the schedule "forward" (both logits, both
  gradients), 6 for "recompute", 4 for `logps` (logits twice, both gradients).
- ours: `dense_kl` with gradients made in forward, or from logits computed anew, and `logps` at 64 ids; chunks of 512 tokens. The schedule
  "forward" is called as the learner calls it, with the `Upstream` of past calls.

A side whose full logits do not fit in the free memory (naive, trl, cce) runs at the most tokens that do, and at half of
them; its figures are then the line through both points, and marked.

JSON: {"V152k": {"memory_over_naive": x, "time_over_gemm": x, "peers": {NAME: {"time": x, "memory": x}}}, "V32k": {...}}: ours is
`dense_kl` forward KL, schedule "forward"; a peer's figures are its time and memory over those of ours of the same divergence.
"sides" holds {NAME: {"seconds": s, "bytes": n}}, "costs" what the table of costs shows.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=130)
VOCABULARIES = {"V152k": 151_936, "V32k": 32_000}
LIMIT_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is computed, how often."""

    tokens: int
    vocabulary: int
    hidden: int = 1024
    ids: int = 64
    chunk_tokens: int = 512
    repeats: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one side took."""

    seconds: float
    bytes: float
    fitted: bool = False  # on a line through smaller cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One implementation in the comparison."""

    step: "Callable[[Inputs, Case], None]"
    floor: int  # matrix products that its schedule needs
    like: str = ""  # ours of the same loss
    full_logits: int = 0  # bytes per logit it is expected to hold at its peak; 0 for chunks
    needs: str = ""  # the package


def main() -> None:
    """Measures all sides for each vocabulary and prints them as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peers", type=Path, help="a folder with packages to compare with")
    parser.add_argument("--only", choices=[*VOCABULARIES, "costs"], help="this vocabulary, or the table of costs, alone")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="these alone; floors of theirs are needed")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="256 tokens, once, no table of costs: to see that it works, not to quote")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.repeats = 256, 1
    if arguments.peers:
        sys.path.append(str(arguments.peers.resolve()))
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(arguments.peers.resolve())])
    figures = {}
    for name in [name for name in VOCABULARIES if arguments.only in (None, name)]:
        case = Case(tokens=arguments.tokens, vocabulary=VOCABULARIES[name], repeats=arguments.repeats)
        figures[name] = compare(name, case, arguments.sides)
    if not arguments.quick and arguments.only in (None, "costs"):
        figures["costs"] = costs(Case(tokens=2048, vocabulary=32_000, repeats=arguments.repeats))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


# ------------------------------------------------------------------------------------------------------------- tables
def compare(name: str, case: Case, sides: list[str]) -> dict:
    """Those sides at one vocabulary."""
    found = {side: cost for side in sides if (cost := measure(side, case)) is not None}
    ours, naive = found.get("ours forward"), found.get("naive")
    table = Table(
        "side", "CPU s", "over its floor", "over naive", "extra MB", "over naive", title=f"{name}, T {case.tokens}, D {case.hidden}"
    )
    for side, cost in found.items():
        floor = found.get(f"floor of {SIDES[side].floor}")
        mark = " (line)" if cost.fitted else ""
        table.add_row(
            side + mark,
            f"{cost.seconds:.2f}",
            f"{cost.seconds / floor.seconds:.2f}" if floor else "-",
            f"{cost.seconds / naive.seconds:.2f}" if naive else "-",
            f"{cost.bytes / 1e6:.0f}",
            f"1/{naive.bytes / max(cost.bytes, 1):.1f}" if naive else "-",
        )
    CONSOLE.print(table)
    peers = {
        side: {"time": cost.seconds / found[like].seconds, "memory": cost.bytes / found[like].bytes}
        for side, cost in found.items()
        if (like := SIDES[side].like) in found
    }
    return {
        "memory_over_naive": ours.bytes / naive.bytes if ours and naive else None,
        "time_over_gemm": ours.seconds / found["floor of 4"].seconds if ours and "floor of 4" in found else None,
        "peers": peers,
        "sides": {side: {"seconds": cost.seconds, "bytes": cost.bytes} for side, cost in found.items()},
    }


def costs(case: Case) -> list[dict]:
    """How ours grows with each size, one at a time; with p ranks, the work of one of them, without collectives."""
    table = Table("side", "T", "V / p", "K", "CPU s", "ns per logit", "extra MB", title="ours as T, V, p or K doubles")
    rows = []
    doubled = [replace(case, **{name: getattr(case, name) * 2}) for name in ("tokens", "vocabulary", "ids")]
    sizes = [case, replace(case, vocabulary=case.vocabulary // 2), *doubled]
    for side in ("ours forward", "ours recompute", "ours logps"):
        for one in sizes if side == "ours logps" else sizes[:-1]:
            if (cost := measure(side, one)) is None:
                continue
            each = cost.seconds / one.tokens / one.vocabulary * 1e9
            table.add_row(
                side, f"{one.tokens}", f"{one.vocabulary}", f"{one.ids}", f"{cost.seconds:.2f}", f"{each:.2f}", f"{cost.bytes / 1e6:.0f}"
            )
            row = {"side": side, "tokens": one.tokens, "vocabulary": one.vocabulary, "ids": one.ids}
            rows.append(row | {"seconds": cost.seconds, "bytes": cost.bytes})
    CONSOLE.print(table)
    return rows


# -------------------------------------------------------------------------------------------------------- measurement
def measure(name: str, case: Case) -> Cost | None:
    """What a side costs; None, and a line that says why, where it does not run."""
    side = SIDES[name]
    if side.needs and importlib.util.find_spec(side.needs) is None:
        CONSOLE.print(f"[bold red]SKIPPED {name}: {side.needs} is not installed (see --peers)")
        return None
    free = psutil.virtual_memory().available * 0.7
    most = case.tokens
    while side.full_logits * most * case.vocabulary > free:
        most //= 2
    if most == case.tokens:
        return alone(name, case)
    CONSOLE.print(f"{name}: {free / 1e9:.1f} GB are not enough for {case.tokens} tokens: a line through {most // 2} and {most}")
    less, more = (alone(name, replace(case, tokens=tokens)) for tokens in (most // 2, most))
    if less is None or more is None:
        return None
    doublings = 2 * (case.tokens / most - 1)
    return Cost(
        seconds=more.seconds + doublings * (more.seconds - less.seconds),
        bytes=more.bytes + doublings * (more.bytes - less.bytes),
        fitted=True,
    )


def alone(name: str, case: Case) -> Cost | None:
    """The same in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(name, case, sending))
    process.start()
    sending.close()
    try:
        answer = receiving.recv() if receiving.poll(LIMIT_S) else f"no figure within {LIMIT_S} s"
    except EOFError:
        answer = "its process died"
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
    if isinstance(answer, Cost):
        return answer
    CONSOLE.print(f"[bold red]SKIPPED {name}: {answer}")
    return None


def _alone(name: str, case: Case, sending: "multiprocessing.connection.Connection") -> None:
    try:
        sending.send(_cost(name, case))
    except Exception:  # the outermost line of this process: whatever a peer raises is its answer
        sending.send(traceback.format_exc(limit=-2))


def _cost(name: str, case: Case) -> Cost:
    import torch

    torch.set_num_threads(1)
    inputs = Inputs(case)
    SIDES[name].step(Inputs(replace(case, tokens=8, vocabulary=256)), replace(case, vocabulary=256))  # imports and compilers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = math.inf
    for _ in range(case.repeats):
        start = time.process_time()
        SIDES[name].step(inputs, case)
        seconds = min(seconds, time.process_time() - start)
    return Cost(seconds=seconds, bytes=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0)


# -------------------------------------------------------------------------------------------------------------- sides
class Inputs:
    """Hidden states and heads of a student and of a teacher near it, and what Megatron holds for the student's head."""

    def __init__(self, case: Case) -> None:
        import torch

        g = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float) -> torch.Tensor:
            out = torch.empty(rows, case.hidden, dtype=torch.bfloat16)
            noise = torch.randn(min(rows, 4096), case.hidden, generator=g).mul_(scale)
            for i, part in enumerate(out.split(4096)):  # float32 noise for all rows would raise the peak before the start
                part.copy_(noise[: len(part)].roll(i, 1))
            return out

        self.hidden = normal(case.tokens, 1.0).requires_grad_()
        self.teacher_hidden = (self.hidden.detach() + normal(case.tokens, 0.3)).requires_grad_(False)
        self.head = torch.nn.Parameter(normal(case.vocabulary, 3 / math.sqrt(case.hidden)))  # logits of standard deviation 3
        self.teacher_head = self.head.detach().clone()
        self.head.main_grad = torch.zeros(self.head.shape)
        self.head.main_grad.fill_(0)
        self.head.grad_added_to_main_grad = False
        self.labels = torch.randint(case.vocabulary, (case.tokens,), generator=g)
        self.ids = torch.randint(case.vocabulary, (case.tokens, case.ids), generator=g)

    def backward(self, loss: "torch.Tensor") -> None:  # noqa: F821 - torch is imported only in the processes that are measured
        """And what Megatron's hook does with a gradient that did not go into `main_grad` by itself."""
        loss.backward()
        if not self.head.grad_added_to_main_grad:
            self.head.main_grad.add_(self.head.grad)
        self.head.grad = self.hidden.grad = None
        self.head.grad_added_to_main_grad = False


def naive(inputs: Inputs, case: Case) -> None:
    """Full logits in float32 and autograd."""
    import torch.nn.functional as F

    logp_TV = F.log_softmax((inputs.hidden @ inputs.head.t()).float(), -1)
    logq_TV = F.log_softmax((inputs.teacher_hidden @ inputs.teacher_head.t()).float(), -1)
    inputs.backward(F.kl_div(logp_TV, logq_TV, reduction="none", log_target=True).sum(-1).sum())


def trl(inputs: Inputs, case: Case) -> None:
    """TRL's own source of `generalized_jsd_loss`, taken out of its trainer, which imports half of its dependencies."""
    import ast

    import torch
    import torch.nn.functional as F

    source = Path(importlib.util.find_spec("trl").origin).parent / "experimental" / "gkd" / "gkd_trainer.py"
    (function,) = (n for n in ast.walk(ast.parse(source.read_text())) if getattr(n, "name", "") == "generalized_jsd_loss")
    function.decorator_list = []
    scope = {"torch": torch, "F": F}
    exec(compile(ast.Module([function], []), str(source), "exec"), scope)
    z_TV = (inputs.hidden @ inputs.head.t()).float()
    u_TV = (inputs.teacher_hidden @ inputs.teacher_head.t()).float()
    inputs.backward(scope["generalized_jsd_loss"](z_TV[None], u_TV[None], beta=0.5))


def liger(inputs: Inputs, case: Case) -> None:
    """Liger's chunked Jensen-Shannon loss, no hard loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, chunk_size=1024, compiled=shutil.which("g++") is not None
    )
    inputs.backward(loss(inputs.hidden, inputs.head, inputs.teacher_hidden, inputs.teacher_head, inputs.labels))


def cce(inputs: Inputs, case: Case) -> None:
    """ml-cross-entropy without Triton."""
    from cut_cross_entropy import linear_cross_entropy

    inputs.backward(linear_cross_entropy(inputs.hidden, inputs.head, inputs.labels, impl="torch_compile"))


def floor(products: int) -> Callable[[Inputs, Case], None]:
    """A side that does the products of one schedule and nothing else."""

    def step(inputs: Inputs, case: Case) -> None:
        import torch

        hidden, head = inputs.hidden.detach(), inputs.head.detach()
        size = min(case.chunk_tokens, len(hidden))
        dlogits = torch.empty(size, len(head), dtype=head.dtype)
        for h in hidden.split(size):
            dz = dlogits[: len(h)]
            for _ in range(products - 2):
                torch.mm(h, head.t(), out=dz)
            torch.mm(dz, head)
            for rows in dz.split(4096, 1):
                torch.mm(rows.t(), h)

    return step


def ours(kind: str, schedule: str) -> Callable[[Inputs, Case], None]:
    """A side that is `dense_kl`."""

    def step(inputs: Inputs, case: Case) -> None:
        from megatron_opd.kernels import Upstream, dense_kl
        from megatron_opd.types import Divergence, VocabShard

        shard = VocabShard(start=0, stop=len(inputs.head), vocab_size=len(inputs.head))
        models = inputs.hidden, inputs.head, inputs.teacher_hidden, inputs.teacher_head
        options = {"chunk_tokens": case.chunk_tokens, "schedule": schedule, "upstream": Upstream()}
        found = dense_kl(*models, shard, Divergence(kind=kind), **options)
        inputs.backward(found.divergence.sum())

    return step


def ours_logps(inputs: Inputs, case: Case) -> None:
    """`logps`, no rests."""
    from megatron_opd.kernels import logps
    from megatron_opd.types import VocabShard

    shard = VocabShard(start=0, stop=len(inputs.head), vocab_size=len(inputs.head))
    inputs.backward(logps(inputs.hidden, inputs.head, inputs.ids, shard, chunk_tokens=case.chunk_tokens).logp.sum())


SIDES = {
    "floor of 4": Side(step=floor(4), floor=4),
    "floor of 6": Side(step=floor(6), floor=6),
    "ours forward": Side(step=ours("forward", "forward"), floor=4),
    "ours reverse": Side(step=ours("reverse", "forward"), floor=4),
    "ours jsd": Side(step=ours("jsd", "forward"), floor=4),
    "ours recompute": Side(step=ours("forward", "recompute"), floor=6),
    "ours logps": Side(step=ours_logps, floor=4),
    "naive": Side(step=naive, floor=4, like="ours forward", full_logits=30),
    "trl": Side(step=trl, floor=4, like="ours jsd", full_logits=60, needs="trl"),
    "liger": Side(step=liger, floor=4, like="ours jsd", needs="liger_kernel"),
    "cce": Side(step=cce, floor=4, like="ours logps", full_logits=20, needs="cut_cross_entropy"),
}


if __name__ == "__main__":
    main()
