"""Which objectives survive stale data: one small student, trained at forced lags by every arm. Two CPU cores, 4 to 5 hours.

    python tools/staleness_study.py                                     # the published grid, into runs/staleness
    python tools/staleness_study.py --quick                             # 2 arms, lags 0 and 4: to see that it works, not to quote
    python tools/staleness_study.py --arms draws,head_tail --lags 0,64 --seeds 1 --out runs/study [key=value ...]
    python tools/staleness_study.py --out examples/staleness_study --report-only          # the published page, from its cells

A cell is an arm, a lag and a seed: one `megatron-opd train` on the arithmetic example with loop.exact_lag, where every batch is
trained exactly `lag` steps after it was generated (the first `lag` batches come from version 0). Each cell that has ended is one
line of OUT/cells.jsonl; a study that was killed goes on where it stopped. Two cells run at a time, each in one process on one core
(--jobs); the first cell alone measures the untrained student and the teacher too. All arms share every setting but the estimator's,
and those that cache ids cache 16 of them per token. A run that stops by itself (loss or gradient not finite, or a guard that key=value
switched on) is a result: no accuracy, which tables and slopes count as 0. The guards are off, so that a student that collapses is
measured. Any other failure ends the study.

Written into OUT: cells.csv, lag.png, variance.png (of what `tools/variance.py --json` wrote), and README.md, whose
figures between markers are replaced while its words stay. The bias of each arm's expected gradient against that of the dense
reverse KL is enumerated exactly, through the learner's own scoring and estimators, on random policies over 8 ids in float64.

JSON: {"arms": {NAME: {"lags": [...], "accuracy": [[per seed]...], "kl": [[...]...], "slope": points per log2(lag + 1)}}}
"""

import argparse
import asyncio
import csv
import difflib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_opd.errors import ConfigError, OPDError
from megatron_opd.estimators import build
from megatron_opd.interfaces import Estimator
from megatron_opd.learner.scores import Heads, Settings, score
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.types import IdSet, MicroBatch, VocabShard

EXAMPLE, HOME, RUNS = Path("examples/arithmetic"), Path("examples/staleness_study"), Path("runs/staleness")
LAGS = (0, 64, 8, 16, 4, 32, 2, 1)  # in the order of running, so that half a study says something too


@dataclass(frozen=True, slots=True)
class Arm:
    """One objective, and the seeds that it runs with when nothing else is asked for."""

    estimator: str
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 3


def _sampled(**settings: str) -> Arm:
    return Arm("sampled_reverse_kl", settings, seeds=1)


MAIN = {
    "forward_kl": Arm("forward_kl_topk", {"top_k": 16}),
    "frozen_clip": Arm("sampled_reverse_kl", {"advantage": "frozen", "correction": "ppo"}),
    "frozen": Arm("sampled_reverse_kl", {"advantage": "frozen"}),
    "recomputed": Arm("sampled_reverse_kl"),
    "draws": Arm("sampled_reverse_kl", {"draws": 16}),
    "head_tail": Arm("head_tail_reverse_kl", {"head": 8, "draws": 8}),
}
OTHERS = {
    "recomputed_clip": _sampled(correction="ppo"),
    "no_ratio": _sampled(correction="none"),
    "truncated": _sampled(correction="truncated"),
    "decoupled": _sampled(correction="decoupled"),
    "m2po": _sampled(correction="m2po"),
    "sequence": _sampled(correction="sequence"),
    "reverse_kl_topk": Arm("reverse_kl_topk", {"head": 16}, seeds=1),
    "dense_reverse_kl": Arm("dense_kl", {"divergence": "reverse"}, seeds=1),
}
ARMS = MAIN | OTHERS
FINDINGS = {  # of arXiv 2606.24143, by the arms that speak of each; the fourth is about throughput
    "finding 1": ("forward_kl", "dense_reverse_kl", "recomputed", "frozen", "frozen_clip"),
    "finding 2": ("recomputed", "recomputed_clip", "frozen", "frozen_clip", "no_ratio", "truncated", "decoupled", "m2po", "sequence"),
    "finding 3": ("reverse_kl_topk", "recomputed", "draws", "head_tail", "dense_reverse_kl"),
}
SETTINGS = {  # of every cell, beside the example's own
    "run.start_timeout_s": 600,  # cells may share their cores with other work
    "run.colocated": "true",  # one process a cell, an eighth quicker on its one core; with loop.exact_lag the steps are the same
    "rollout.cores": "[]",
    "loop.exact_lag": "true",
    "loop.batch": 32,
    "learner.optimizer.lr": 3e-4,  # at its peak; one for all arms, of 1e-3, 3e-4 and 1e-4 the best for the noisiest, `recomputed`, at lag 0
    "learner.moments": "false",
    "guard.length_growth": 0,  # a collapse is measured, not cut short
    "guard.support_mass": 0,
    "eval.limit": 200,
}
START_S, STEP_S = 50, 0.6  # start-up with evaluation, and one step, on one core; only until a first cell has been timed
RATIOS = ("ratio_p01", "ratio_p50", "ratio_p99", "effective_samples")
GONE_WRONG = re.compile(r"step \d+: (the loss is|the gradient norm is|responses have grown|the student gives)[^;]*")


def main() -> None:
    """Runs the cells that are missing, then reports on all that are there."""
    arguments = _arguments()
    try:
        _pyplot()  # hours are not spent before this is known to work
        if not arguments.report_only:
            study(arguments)
        report(arguments.out, arguments.variance, arguments.bench_loop, arguments.json)
    except OPDError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every cell beside the study's own")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}, with commas and no spaces; default: all")
    parser.add_argument("--lags", help="optimizer steps, e.g. 0,4,64; default: 0,1,2,4,8,16,32,64")
    parser.add_argument("--seeds", type=int, help=f"default: 3 for {', '.join(MAIN)}; 1 for the others")
    parser.add_argument("--steps", type=int, help="optimizer steps of a cell; default: 144, more than twice the largest lag")
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="cells at a time, a core for each")
    parser.add_argument("--out", type=Path, help=f"default: {RUNS}, with --quick {RUNS}_quick; {HOME} has the published cells")
    parser.add_argument("--quick", action="store_true", help="2 arms, lags 0 and 4, 1 seed, 12 steps, 20 held-out problems")
    parser.add_argument("--report-only", action="store_true", help="run nothing; write OUT's README.md, cells.csv and plots again")
    parser.add_argument("--variance", type=Path, help="JSON of tools/variance.py; default: variance.json in OUT, if it is there")
    parser.add_argument("--bench-loop", type=Path, help="JSON of tools/bench_loop.py; default: bench_loop.json in OUT, if it is there")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_intermixed_args()
    if arguments.quick:
        quick = {"arms": "forward_kl,recomputed", "lags": "0,4", "seeds": 1, "steps": 12, "out": Path(f"{RUNS}_quick")}
        vars(arguments).update({name: value for name, value in quick.items() if getattr(arguments, name) is None})
        arguments.overrides.insert(0, "eval.limit=20")
    arguments.steps, arguments.out = arguments.steps or 144, arguments.out or RUNS
    for name in ("variance", "bench_loop"):  # of this grid's own, where they stand beside it
        beside = arguments.out / f"{name}.json"
        vars(arguments)[name] = getattr(arguments, name) or (beside if beside.exists() else None)
    return arguments


# --------------------------------------------------------------------------------------------------------- the cells
@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    arm: str
    lag: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-lag{self.lag}-seed{self.seed}"


def plan(arms: str | None = None, lags: str | None = None, seeds: int | None = None) -> list[Cell]:
    """Seed by seed, the telling lags first, within a lag the main arms first.

    Raises:
        ConfigError: an arm is unknown, with the nearest known one.
    """
    chosen = arms.split(",") if arms else list(ARMS)
    for name in set(chosen) - set(ARMS):
        near = difflib.get_close_matches(name, ARMS, n=1)
        raise ConfigError(f"unknown arm {name}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(ARMS)}"))
    given = [int(lag) for lag in lags.split(",")] if lags else None
    order = [lag for lag in LAGS if given is None or lag in given] + [lag for lag in given or [] if lag not in LAGS]
    every = itertools.product(range(max([seeds or 0, *(ARMS[name].seeds for name in chosen)])), order, (n for n in ARMS if n in chosen))
    wanted = (Cell(name, lag, seed) for seed, lag, name in every)
    return [cell for cell in wanted if cell.seed < (seeds or ARMS[cell.arm].seeds)]


def study(arguments: argparse.Namespace) -> None:
    """Runs what is missing of the grid, and says how long the rest will take."""
    cells = plan(arguments.arms, arguments.lags, arguments.seeds)
    if late := [cell for cell in cells if cell.lag >= arguments.steps]:
        raise ConfigError(f"--steps={arguments.steps} never reaches lag {late[0].lag}; take more steps, or leave that lag out")
    given = dict(override.partition("=")[::2] for override in arguments.overrides)
    settings = SETTINGS | {"loop.steps": arguments.steps, "learner.optimizer.warmup_steps": arguments.steps // 16} | given
    _keep_settings(arguments.out, {name: str(value) for name, value in settings.items()})
    subprocess.run([EXAMPLE / "prepare.sh"], check=True)
    try:
        asyncio.run(_run_missing(cells, settings, arguments.out, sorted(os.sched_getaffinity(0))[: arguments.jobs]))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(f"ended; the cells in {arguments.out / 'cells.jsonl'} are kept, and the same command goes on from there")


async def _run_missing(cells: Sequence[Cell], settings: dict[str, Any], out: Path, cores: Sequence[int]) -> None:
    """Each core takes the next cell as soon as it is free; the first that fails ends the others."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # as for SIGINT: cells end with the study
    there = read(out)
    done = {Cell(line["arm"], line["lag"], line["seed"]) for line in there}
    missing = [cell for cell in cells if cell not in done]
    seconds = [line["seconds"] for line in there]
    waiting = iter(enumerate(missing))

    async def work(core: int) -> None:
        for number, cell in waiting:
            each = statistics.mean(seconds) if seconds else START_S + STEP_S * settings["loop.steps"]
            hours = f"{(len(missing) - number) * each / len(cores) / 3600:.1f} h to go"
            progress.console.print(f"{len(cells) - len(missing) + number + 1}/{len(cells)} {cell}, {hours}", highlight=False)
            line = await run(cell, settings if cell == cells[0] else settings | {"eval.models": "[after]"}, out, core)
            append(out, line)
            seconds.append(line["seconds"])
            found = line["stopped"] or f"accuracy {line['accuracy']}, KL {line['kl']}"
            progress.console.print(f"  {cell}: {found} in {line['seconds']:.0f} s", highlight=False)
            progress.advance(task)

    columns = ("cells", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, auto_refresh=False, speed_estimate_period=1e9) as progress:
        task = progress.add_task("", total=len(missing))
        async with asyncio.TaskGroup() as tasks:
            for core in cores:
                tasks.create_task(work(core))


def _keep_settings(out: Path, settings: dict[str, str]) -> None:
    """Cells of different settings must not stand in one table."""
    file = out / "settings.json"
    before = json.loads(file.read_text()) if read(out) else settings
    for name in before | settings:
        if before.get(name) != settings.get(name):
            raise ConfigError(f"the cells in {out} ran with {name}={before.get(name)}, not {settings.get(name)}; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


async def run(cell: Cell, settings: dict[str, Any], out: Path, core: int) -> dict:
    """Trains one cell with the product itself and returns its line; the run's directory is gone afterwards, unless it failed."""
    folder, log, arm = out / "runs" / str(cell), out / "runs" / f"{cell}.log", ARMS[cell.arm]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = {"run.dir": folder, "run.seed": cell.seed, "loop.max_lag": cell.lag, "estimator.name": arm.estimator}
    own |= {f"estimator.settings.{name}": value for name, value in arm.settings.items()}
    words = [f"{name}={value}" for name, value in (settings | own).items()]
    started = time.monotonic()
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "megatron_opd", "train", str(EXAMPLE / "config.yaml"), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=partial(_start, os.getpid(), core),
        )
    try:
        failed = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    said = log.read_text()
    wrong = GONE_WRONG.search(said) if failed else None
    if failed and not wrong:
        raise OPDError(f"{cell} failed, see {folder}; its last words:\n" + "\n".join(said.splitlines()[-20:]))
    line = harvest(cell, folder, wrong and wrong.group()) | {"seconds": round(time.monotonic() - started, 1)}
    shutil.rmtree(folder)
    log.unlink()
    return line


def _start(parent: int, core: int) -> None:
    """What a cell's launcher does before it starts; its roles inherit the core."""
    die_with_parent(parent)
    os.sched_setaffinity(0, {core})


def harvest(cell: Cell, folder: Path, stopped: str | None) -> dict:
    """What is kept of a run: its evaluation, its ratios over the last quarter of the steps, and 16 points of its loss."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = {} if stopped else json.loads((folder / "summary.json").read_text())
    if not stopped and summary["observed_lag_max"] != min(cell.lag, len(steps) - 1):
        raise OPDError(f"{cell} was trained at lag {summary['observed_lag_max']}: loop.exact_lag is broken")
    last = [step["diagnostics"] for step in steps[-max(1, len(steps) // 4) :]]
    known = [name for name in RATIOS if last and name in last[0]]
    losses = np.array_split([step["loss"] for step in steps], max(1, min(16, len(steps))))
    return {
        "arm": cell.arm, "lag": cell.lag, "seed": cell.seed,
        "accuracy": summary.get("accuracy_after"), "kl": summary.get("kl_after"), "stopped": stopped, "steps": len(steps),
        "step_seconds": round(statistics.median(step["step_seconds"] for step in steps), 3) if steps else None,
        **{name: round(statistics.mean(one[name] for one in last), 4) if name in known else None for name in RATIOS},
        "losses": [round(float(part.mean()), 4) for part in losses if len(part)],
        **{name: summary.get(name) for name in ("accuracy_before", "kl_before", "teacher_accuracy")},
    }  # fmt: skip


def append(out: Path, line: dict) -> None:
    """One line in one write, on disk when this returns."""
    descriptor = os.open(out / "cells.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, json.dumps(line, allow_nan=False).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(out: Path) -> list[dict]:
    """All cells that have ended, seed by seed; the beginning of a line that a full disk or a power cut left is removed."""
    file = out / "cells.jsonl"
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(file, len(whole))
    return sorted((json.loads(line) for line in whole.splitlines()), key=lambda line: line["seed"])


# ---------------------------------------------------------------------------------------------------------- the bias
VOCAB, POSITIONS, POLICIES, DRIFTS = 8, 2, 8, (0.0, 0.3, 1.0)
SMALL = {"top_k": 3, "head": 3, "draws": 2}  # what can be enumerated


def bias(arm: Arm, drift: float) -> float:
    """|E_b g - G| / |G|, g the arm's gradient over the student's logits, G that of KL(p || q), root mean square over policies.

    Responses have two tokens, so that weights of whole responses show; b = p + `drift` times normal noise, in logits.
    """
    estimator = build(arm.estimator, {name: SMALL.get(name, value) for name, value in arm.settings.items()})
    generator = torch.Generator().manual_seed(0)
    errors, sizes = 0.0, 0.0
    for _ in range(POLICIES):
        p, q, noise = torch.randn(3, POSITIONS, VOCAB, generator=generator, dtype=torch.float64)
        p, q = 1.5 * p.requires_grad_(), 1.5 * q
        logp, logq = p.log_softmax(-1), q.log_softmax(-1)
        (exact,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), p)
        errors += (expected_gradient(estimator, p.detach(), q, p.detach() + drift * noise) - exact).square().sum().item()
        sizes += exact.square().sum().item()
    return (errors / sizes) ** 0.5


def expected_gradient(estimator: Estimator, p_RV: torch.Tensor, q_RV: torch.Tensor, b_RV: torch.Tensor) -> torch.Tensor:
    """The gradient [R, V] over the student's logits in expectation over all W ways in which b's samples of R positions can fall."""
    needs, (R, V) = estimator.needs, p_RV.shape
    b_logp, q_logp = b_RV.log_softmax(-1), q_RV.log_softmax(-1)
    head_RK = b_logp.topk(needs.head, -1).indices
    source_RV = b_logp.exp().scatter(1, head_RK, 0.0) if needs.draws else b_logp.exp()
    source_RV = source_RV / source_RV.sum(-1, keepdim=True)
    ways = [torch.tensor(list(itertools.product(row.nonzero()[:, 0].tolist(), repeat=max(needs.draws, 1)))) for row in source_RV]
    index_WR = torch.cartesian_prod(*(torch.arange(len(way)) for way in ways))
    picked_WRm = torch.stack([way[index] for way, index in zip(ways, index_WR.T)], 1)
    W = len(picked_WRm)
    weight_W = source_RV.expand(W, R, V).gather(2, picked_WRm).prod(-1).prod(-1)

    def id_set(ids: torch.Tensor, counts: torch.Tensor | None = None) -> IdSet:
        b, q = (logp.repeat(W, 1) for logp in (b_logp, q_logp))
        rest = q.scatter(1, ids, -torch.inf).logsumexp(-1)
        return IdSet(ids=ids, counts=counts, behaviour_logp=b.gather(1, ids), teacher_logp=q.gather(1, ids), teacher_log_rest=rest)

    picked = picked_WRm.flatten(0, 1)
    batch = MicroBatch(
        token_ids=torch.zeros(W * R, dtype=torch.int64),
        positions=torch.arange(R).repeat(W),
        boundaries=torch.arange(0, W * R + 1, R, dtype=torch.int32),
        sequences=torch.arange(W).repeat_interleave(R),
        mask=torch.ones(W * R, dtype=torch.bool),
        token=id_set(picked[:, :1]),
        head=id_set(head_RK.repeat(W, 1)) if needs.head else None,
        draws=id_set(picked, torch.ones(picked.shape, dtype=torch.float64)) if needs.draws else None,
        top=id_set(q_logp.topk(needs.teacher_top, -1).indices.repeat(W, 1)) if needs.teacher_top else None,
        teacher_hidden=q_RV.repeat(W, 1) if needs.divergence else None,
    )
    logits = p_RV.repeat(W, 1).requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)  # as LM head: hidden states are the logits
    heads = Heads(student=identity, teacher=identity, shard=VocabShard(start=0, stop=V, vocab_size=V))
    scores, _ = score(logits, heads, batch, needs, Settings(chunk_tokens=W * R))
    (grad,) = torch.autograd.grad(estimator(scores).loss.sum(), logits)
    return (weight_W[:, None, None] * grad.view(W, R, V)).sum(0)


# -------------------------------------------------------------------------------------------------------- the report
def report(out: Path, variance: Path | None = None, bench: Path | None = None, file: Path | None = None) -> None:
    """Tables and plots of every cell in `out`.

    Raises:
        ConfigError: there is none.
    """
    cells = read(out)
    if not cells:
        raise ConfigError(f"{out} holds no cells.jsonl with a finished cell; run the study without --report-only, or name another --out")
    figures = summarise(cells)
    with (out / "cells.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, [name for name in cells[0] if name != "losses"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(cells)
    plot_lags(figures, out / "lag.png")
    biases = [["arm", *(f"drift {drift:g}" for drift in DRIFTS)]]
    biases += [[name, *(f"{bias(arm, drift):.2g}" for drift in DRIFTS)] for name, arm in ARMS.items()]
    sections = {"setting": _setting(out, cells), "curves": "![accuracy and KL against lag](lag.png)", "bias": markdown(biases)}
    for name, arms in FINDINGS.items():
        ran = [arm for arm in arms if arm in figures["arms"]]
        tables = [markdown(by_lag(figures, ran, key)) for key in ("accuracy", "kl")] if ran else ["None of its arms has run."]
        sections[name] = "\n\n".join(tables)
    if variance:
        sections["variance"] = plot_variance(json.loads(variance.read_text())["cache_ids"], out / "variance.png")
    if bench:
        ratios = json.loads(bench.read_text())["async_over_sync"]
        sections["finding 4"] = markdown([["max_lag", "throughput over max_lag 0"], *([lag, f"{x:.2f}"] for lag, x in ratios.items())])
    readme = out / "README.md"
    text = readme.read_text() if readme.exists() else "# A staleness study\n\n" + "\n\n".join(map(_empty, sections)) + "\n"
    readme.write_text(fill(text, sections))
    for title, rows in (("held-out exact match, %", by_lag(figures, ARMS, "accuracy")), ("relative bias of the gradient", biases)):
        table = Table(*rows[0], title=title)
        for row in rows[1:]:
            table.add_row(*row)
        Console(width=150).print(table)
    if file:
        file.write_text(json.dumps(figures, indent=1, allow_nan=False))


def summarise(cells: Iterable[dict]) -> dict:
    """The figures of --json."""
    arms = {}
    for name in ARMS:
        mine = [cell for cell in cells if cell["arm"] == name]
        if mine:
            lags = sorted({cell["lag"] for cell in mine})
            by_key = {key: [[cell[key] for cell in mine if cell["lag"] == lag] for lag in lags] for key in ("accuracy", "kl")}
            arms[name] = {"lags": lags} | by_key
            arms[name]["slope"] = slope(lags, counted(arms[name], "accuracy"))
    return {"arms": arms}


def counted(arm: dict, key: str) -> list[list[float]]:
    """The values per lag that means are taken of: a run that stopped has accuracy 0, and no KL."""
    return [[value or 0.0 for value in values if key == "accuracy" or value is not None] for values in arm[key]]


def slope(lags: Sequence[int], accuracy: Sequence[Sequence[float]]) -> float | None:
    """Points of accuracy per log2(lag + 1), by least squares over all cells; None for a single lag."""
    points = [(np.log2(lag + 1), 100 * value) for lag, values in zip(lags, accuracy) for value in values]
    return float(np.polyfit(*zip(*points), 1)[0]) if len(lags) > 1 else None


def by_lag(figures: dict, arms: Iterable[str], key: str) -> list[list[str]]:
    """Rows of a table: means over seeds with the standard deviation, * where a run stopped by itself; accuracy in points, with slopes."""
    found = {name: figures["arms"][name] for name in arms if name in figures["arms"]}
    lags = sorted({lag for arm in found.values() for lag in arm["lags"]})
    unit, form = ("accuracy, %", ".1f") if key == "accuracy" else ("KL, nats/token", ".3f")

    def text(values: list[float], stopped: bool) -> str:
        values = [value * (100 if key == "accuracy" else 1) for value in values]
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return (f"{statistics.mean(values):{form}}{spread}" if values else "–") + "*" * stopped

    rows = [[unit, *(f"lag {lag}" for lag in lags)] + ["slope"] * (key == "accuracy")]
    for name, arm in found.items():
        texts = {lag: text(values, None in raw) for lag, values, raw in zip(arm["lags"], counted(arm, key), arm["accuracy"])}
        steepness = ["–" if arm["slope"] is None else f"{arm['slope']:+.2f}"] * (key == "accuracy")
        rows.append([name, *(texts.get(lag, "") for lag in lags), *steepness])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _empty(section: str) -> str:
    return f"## {section.capitalize()}\n\n<!-- figures: {section} -->\n<!-- end -->"


def fill(text: str, sections: dict[str, str]) -> str:
    """`text` with what stands between `<!-- figures: NAME -->` and `<!-- end -->` replaced; sections that are not given stay."""
    for name, section in sections.items():
        opening = f"<!-- figures: {name} -->"
        text = re.sub(f"{re.escape(opening)}.*?<!-- end -->", lambda _, new=f"{opening}\n{section}\n<!-- end -->": new, text, flags=re.S)
    return text


def _setting(out: Path, cells: list[dict]) -> str:
    settings = json.loads((out / "settings.json").read_text())
    seconds = [cell["seconds"] for cell in cells]
    time = f"a median of {statistics.median(seconds):.0f} s and {sum(seconds) / 3600:.1f} hours together, each on one core"
    lines = [f"- {len(cells)} cells, {time}, at times beside other work"]
    if whole := next((cell for cell in cells if cell["accuracy_before"] is not None), None):
        before = f"{100 * whole['accuracy_before']:.1f} % before, at a KL of {whole['kl_before']:.3f}"
        lines.append(f"- the student solves {before}; the teacher {100 * whole['teacher_accuracy']:.1f} %")
    return "\n".join([*lines, "- every cell: " + ", ".join(f"`{name}={value}`" for name, value in settings.items())])


def plot_lags(figures: dict, file: Path) -> None:
    """Accuracy and KL against lag, lines through the means over seeds, bands from the least to the largest."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, sharey="row", layout="constrained")
    labels = {"accuracy": "held-out exact match, %", "kl": "held-out KL to the teacher, nats/token"}
    for (row, key), (column, arms) in itertools.product(enumerate(labels), enumerate((MAIN, OTHERS))):
        axis = axes[row, column]
        for name in (name for name in arms if name in figures["arms"]):
            arm = figures["arms"][name]
            scale = 100 if key == "accuracy" else 1
            points = [(np.log2(lag + 1), scale * np.array(values)) for lag, values in zip(arm["lags"], counted(arm, key)) if values]
            x = [at for at, _ in points]
            axis.plot(x, [values.mean() for _, values in points], marker="o", label=name)
            axis.fill_between(x, [values.min() for _, values in points], [values.max() for _, values in points], alpha=0.15)
        axis.set_xticks(np.log2(np.array(sorted(LAGS)) + 1), labels=sorted(LAGS))
        axis.grid(alpha=0.3)
        if axis.lines and row == 0:
            axis.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above, where no line passes
        if column == 0:
            axis.set_ylabel(labels[key])
    axes[1, 0].set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("lag k, optimizer steps (spaced as log2(k + 1))")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_variance(cache_ids: dict[str, dict[str, Any]], file: Path) -> str:
    """Gradient variance against bytes cached per response token, equal draws stored once; returns the table."""
    plt = _pyplot()
    sizes = sorted(cache_ids, key=int)
    stored = {int(size): cache_ids[size]["stored"] for size in sizes}  # distinct ids
    num_bytes = {
        "draws": [8 + 16 * one["draws"] for one in stored.values()],
        "head_tail": [8 + 12 * (size // 2) + 16 * (one["head_tail"] - size // 2) for size, one in stored.items()],
    }
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("draws", "m draws"), ("head_tail", "head and tail")):
        axis.loglog(num_bytes[name], [cache_ids[size][name] for size in sizes], marker="o", label=label)
    axis.set(xlabel="bytes cached per response token", ylabel="total variance of the logit gradient")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    rows = [["ids", "m draws", "bytes", "head and tail", "bytes", "ratio at equal ids", "at equal storage"]]
    for size, draws_bytes, head_tail_bytes in zip(sizes, num_bytes["draws"], num_bytes["head_tail"]):
        draws, head_tail, same = (cache_ids[size][name] for name in ("draws", "head_tail", "draws_same_storage"))
        ratios = f"{draws / head_tail:.1f}", f"{same / head_tail:.1f}"
        rows.append([size, f"{draws:.3g}", f"{draws_bytes:.0f}", f"{head_tail:.3g}", f"{head_tail_bytes:.0f}", *ratios])
    return f"![gradient variance against cached bytes]({file.name})\n\n{markdown(rows)}"


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib, which draws the plots, is not installed; run: pip install -e '.[study]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    main()
