r"""Gradient variance of m draws against head and tail at equal cache, on real logits. One CPU core, 4 GB, about 5 minutes.

    examples/smollm2/run.sh loop.export_every=4 run.dir=RUN
    python tools/variance.py --teacher examples/smollm2/models/teacher --behaviour RUN/hf-28 --student RUN/hf-32 \
        --prompts examples/smollm2/data/heldout.jsonl --json FILE

The teacher is q, the student p; the behaviour policy b is the same student some updates older. vLLM samples responses from b
and records a head of b and draws from its tail, one engine for each head size; transformers gives all three distributions in
full. The variance of a gradient g for the student's logits is the mean over positions of E|g - E g|^2:

- exact: by its closed form, without the noise of draws; also the squared bias of the head alone (`reverse_kl_topk`);
- measured: |g - gradient of the dense KL|^2 where g comes from the project's own estimator at vLLM's draws. The two must agree.

The closed form is that of head and tail without its baseline. What the baseline, on by default, leaves of it is measured at the
same draws, half head, half tail: "head_tail" is the closed form times that share.

Duplicate draws are stored once, so m draws fill less than m places: "stored" counts distinct ids, and "draws_same_storage" is
the variance of as many draws as fill what half head, half tail fills.

When to choose which: see the table in examples/OBJECTIVES.md, made by the example above. Half and half is within 7 % of the best
split from 16 ids on; smaller caches and flatter b want a smaller head. The head alone errs less in one step than either varies, but its
bias does not average out over tokens and steps.

JSON: {"cache_ids": {"16": {"draws": v, "head_tail": v, "without_baseline": v, "ratio": x, "splits": {"1/4": v, ...}, "best_head": K,
"best": v, "topk_bias2": v, "standard_error": {...}, "stored": {...}, "draws_same_storage": v}, ...}, "quartiles": [{"entropy": [from, to],
"cache_ids": as above}, ...], "measured": [{"cache_ids": C, "head": K, "variance": v, "standard_error": v, "exact": v}, ...],
"positions": n}
"""

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_opd.config import DataConfig, RolloutConfig
from megatron_opd.data.prompts import PromptSource, load_records, load_tokenizer
from megatron_opd.estimators import build
from megatron_opd.runtime.environment import environment
from megatron_opd.types import IdScores, Needs, Prompt, Rollout, TokenScores

# Dimension key: N all positions, R positions of one response, V vocabulary, K head ids, m draws, S cache sizes.

SPLITS = {"1/4": 1 / 4, "1/2": 1 / 2, "3/4": 3 / 4, "7/8": 7 / 8}  # share of the head in the cache
DEFAULT = SPLITS["1/2"]
DRAWS = 128  # of each position by vLLM: several sets of them for all but the largest cache
MANY = 2 ** torch.arange(0, 15)  # numbers of draws whose storage is known
TOLERANCE = 1e-3  # nats, between vLLM's log b and that of transformers


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands, and defaults."""


def main() -> None:
    """Samples, measures, prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    for role, what in {"teacher": "q", "student": "p", "behaviour": "b: an older export of the student's run"}.items():
        parser.add_argument(f"--{role}", required=True, metavar="FOLDER", help=f"Hugging Face folder of {what}")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="ids in the cache of a position")
    parser.add_argument("--responses", type=int, default=10, help="responses for each head size")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response at most")
    arguments = parser.parse_args()
    os.environ.update(environment("cpu"))
    figures = summary(measure(arguments), arguments.sizes)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


# -------------------------------------------------------------------------------------------------- three distributions
@dataclass(frozen=True, kw_only=True)
class Policies:
    """Log-probabilities [R, V] over the whole vocabulary at the positions of a response, float64."""

    student: torch.Tensor
    teacher: torch.Tensor
    behaviour: torch.Tensor

    @cached_property
    def gradient(self) -> torch.Tensor:
        """d KL(p || q) / d logits of p [R, V] = p (log p - log q - KL)."""
        p, gap = self.student.exp(), self.student - self.teacher
        return p * (gap - (p * gap).sum(-1, keepdim=True))

    @cached_property
    def order(self) -> torch.Tensor:
        """All ids [R, V] by falling b."""
        return self.behaviour.argsort(-1, descending=True)


def sample(path: str, head: int, prompts: Sequence[Prompt], tokens: int) -> list[Rollout]:
    """One response to each prompt with head and tail draws at every token, by an engine of its own."""
    from megatron_opd.rollout.engine import EngineSettings, VLLMRollout

    async def run() -> list[Rollout]:
        settings = EngineSettings(
            rollout=RolloutConfig(dtype="float32", max_response_tokens=tokens),
            path=path,
            needs=Needs(behaviour_logp=True, head=head, draws=DRAWS),
            max_model_len=max(len(prompt.token_ids) for prompt in prompts) + tokens,
        )
        engine = await VLLMRollout.start(settings)
        try:
            return await asyncio.gather(*(engine.generate(prompt) for prompt in prompts))
        finally:
            await engine.close()

    return asyncio.run(run())


def distributions(models: dict[str, PreTrainedModel], rollout: Rollout) -> Policies:
    """A plain forward pass of each model over one response; what vLLM recorded is held against it."""
    ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()[None]
    length = len(rollout.response_ids)
    with torch.no_grad():
        logp = {role: model(ids, logits_to_keep=length + 1).logits[0, :-1].double().log_softmax(-1) for role, model in models.items()}
    recorded = [(np.repeat(np.arange(length), rollout.draw_sizes), rollout.draw_ids, rollout.draw_logp)]
    recorded += [(np.arange(length)[:, None], rollout.head_ids, rollout.head_logp)] if rollout.head_ids is not None else []
    gap = max(np.abs(logp["behaviour"].numpy()[rows, ids] - cached).max() for rows, ids, cached in recorded)
    assert gap < TOLERANCE, f"vLLM's log b is {gap:.1e} nats off the forward pass, wanted {TOLERANCE} at most"
    return Policies(**logp)


# -------------------------------------------------------------------------------------------------------- closed forms
def one_draw_variance(at: Policies, heads: Sequence[int]) -> torch.Tensor:
    """Variance [R, len(heads)] of head and tail with a single draw; m draws have 1/m of it, and head 0 leaves them all to draws.

    A draw i from the tail T contributes tau (p/b) a_i (e_i - p), a = log p - log q, tau = sum_T b, e_i the i-th unit vector:
    variance = tau sum_T (p a)^2 / b |e_i - p|^2 - |sum_T p a (e_i - p)|^2.
    """
    logp, logq, logb = (x.gather(-1, at.order) for x in (at.student, at.teacher, at.behaviour))
    p, gap = logp.exp(), logp - logq
    norm = p.square().sum(-1, keepdim=True)

    def tail(x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1).cumsum(-1).flip(-1)[:, heads]  # the smallest first: no difference of large numbers

    second = tail(logb.exp()) * tail((2 * logp - logb).exp() * gap.square() * (1 - 2 * p + norm))
    mean = tail(p * gap)
    return (second - tail((p * gap).square()) + 2 * mean * tail(p.square() * gap) - mean.square() * norm).clamp_min(0)


def stored(at: Policies, head: int, draws: int) -> torch.Tensor:
    """Expected number [R] of distinct ids among a head and draws from the tail."""
    logb = at.behaviour.gather(-1, at.order)[:, head:].log_softmax(-1)
    return head - torch.expm1(draws * torch.log1p(-logb.exp().clamp_max(1))).sum(-1)


# ------------------------------------------------------------------------------------------------------ the estimators
def squared_error(name: str, settings: dict, at: Policies, head: torch.Tensor | None, draws: torch.Tensor | None) -> torch.Tensor:
    """|g - dense gradient|^2 [R] of an estimator of the project, by autograd, at given head [R, K] and draws [R, m]."""
    logits = at.student.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    seen = {}
    for kind, ids in {"head": head, "draws": draws}.items():
        if ids is not None:
            seen[kind] = IdScores(
                ids=ids,
                counts=torch.ones_like(ids, dtype=logp.dtype) if kind == "draws" else None,
                student_logp=logp.gather(-1, ids),
                behaviour_logp=at.behaviour.gather(-1, ids),
                teacher_logp=at.teacher.gather(-1, ids),
                student_log_rest=logp.scatter(-1, ids, -torch.inf).logsumexp(-1) if kind == "head" else None,
                teacher_log_rest=at.teacher.scatter(-1, ids, -torch.inf).logsumexp(-1) if kind == "head" else None,
            )
    row = torch.zeros(len(logits), dtype=torch.long)
    loss = build(name, settings)(TokenScores(mask=row == 0, sequences=row, **seen)).loss
    return (torch.autograd.grad(loss.sum(), logits)[0] - at.gradient).square().sum(-1)


def squared_error_of_draws(
    at: Policies, head: torch.Tensor | None, draws: torch.Tensor, num: int, *, baseline: bool = False
) -> torch.Tensor:
    """The mean [R] over as many disjoint sets of `num` draws as the independent draws [R, M] hold; without a head: m draws."""
    name, settings = ("sampled_reverse_kl", {}) if head is None else ("head_tail_reverse_kl", {"head": head.shape[1], "baseline": baseline})
    sets = [draws[:, first : first + num] for first in range(0, draws.shape[1] - num + 1, num)]
    return torch.stack([squared_error(name, settings | {"draws": num}, at, head, ids) for ids in sets]).mean(0)


# ----------------------------------------------------------------------------------------------------------- all figures
@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of each position."""

    entropy: torch.Tensor  # [N] nats, of b
    one_draw: torch.Tensor  # [N, largest size] exact variance of one draw, by head size
    bias2: torch.Tensor  # [N, S] of the head alone
    stored_draws: torch.Tensor  # [N, len(MANY)]
    stored_split: torch.Tensor  # [N, S] at the default split
    measured: dict[tuple[int, int], torch.Tensor]  # (size, head) -> [N, 4] squared error, the same with baseline, its exact mean, entropy


def figures_of(at: Policies, rollout: Rollout, sizes: Sequence[int], rng: np.random.Generator) -> Figures:
    """The figures of one response; measured are the caches that what vLLM recorded allows for."""
    drawn = np.repeat(rollout.draw_ids, rollout.draw_counts).reshape(len(rollout.response_ids), -1)
    draws = torch.tensor(rng.permuted(drawn, axis=1)).long()  # merged draws lie sorted; shuffled, each part of them is independent
    ids = None if rollout.head_ids is None else torch.tensor(rollout.head_ids).long()
    head = 0 if ids is None else ids.shape[1]
    one_draw, entropy = one_draw_variance(at, range(max(sizes))), -(at.behaviour.exp() * at.behaviour).sum(-1)
    here = [size for size in sizes if head in (0, *(int(share * size) for share in SPLITS.values()))]
    return Figures(
        entropy=entropy,
        one_draw=one_draw,
        bias2=torch.stack([squared_error("reverse_kl_topk", {"head": size}, at, at.order[:, :size], None) for size in sizes], -1),
        stored_draws=torch.stack([stored(at, 0, int(many)) for many in MANY], -1),
        stored_split=torch.stack([stored(at, int(DEFAULT * size), size - int(DEFAULT * size)) for size in sizes], -1),
        measured={
            (size, head): torch.stack(
                [
                    squared_error_of_draws(at, ids, draws, size - head),
                    squared_error_of_draws(at, ids, draws, size - head, baseline=True),
                    one_draw[:, head] / (size - head),
                    entropy,
                ],
                -1,
            )
            for size in here
        },
    )


def measure(arguments: argparse.Namespace) -> Figures:
    """Samples with each head size in turn, then looks at every position."""
    tokenizer = load_tokenizer(arguments.teacher)
    data = DataConfig(prompts=arguments.prompts, chat_template=bool(tokenizer.chat_template))
    source = PromptSource(load_records(data.prompts, tokenizer, data, completions=False), seed=0, shuffle=True)
    prompts, rollouts = map(source.prompt, count()), []
    for head in sorted({0, *(int(DEFAULT * size) for size in arguments.sizes)}):
        rollouts += sample(arguments.behaviour, head, list(islice(prompts, arguments.responses)), arguments.tokens)
    paths = {"student": arguments.student, "teacher": arguments.teacher, "behaviour": arguments.behaviour}
    models = {role: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for role, path in paths.items()}
    rng = np.random.default_rng(0)
    return join([figures_of(distributions(models, rollout), rollout, arguments.sizes, rng) for rollout in rollouts])


def join(parts: Sequence[Figures]) -> Figures:
    """The figures of all responses."""
    keys = sorted({key for part in parts for key in part.measured})
    measured = {key: torch.cat([part.measured[key] for part in parts if key in part.measured]) for key in keys}
    plain = [field.name for field in fields(Figures) if field.name != "measured"]
    return Figures(measured=measured, **{name: torch.cat([getattr(part, name) for part in parts]) for name in plain})


def summary(figures: Figures, sizes: Sequence[int]) -> dict:
    """Means over positions, over each quartile of entropy, and of what was measured: the JSON."""
    quartiles = figures.entropy.argsort().chunk(4)
    return {
        "cache_ids": by_size(figures, torch.arange(len(figures.entropy)), sizes),
        "quartiles": [
            {"entropy": [figures.entropy[rows[0]].item(), figures.entropy[rows[-1]].item()], "cache_ids": by_size(figures, rows, sizes)}
            for rows in quartiles
        ],
        "measured": [
            {"cache_ids": size, "head": head, "variance": seen[:, 0].mean().item(), "exact": seen[:, 2].mean().item()}
            | {"with_baseline": seen[:, 1].mean().item(), "standard_error": standard_error(seen[:, 0] - seen[:, 2])}
            for (size, head), seen in figures.measured.items()
        ],
        "positions": len(figures.entropy),
    }


def by_size(figures: Figures, rows: torch.Tensor, sizes: Sequence[int]) -> dict:
    """The means over some positions."""
    one_draw, table = figures.one_draw[rows], {}
    for column, size in enumerate(sizes):
        variance = one_draw[:, :size] / (size - torch.arange(size))  # [rows, K] by head size
        mean, half = variance.mean(0), int(DEFAULT * size)
        places = figures.stored_split[rows, column].mean()
        filled = figures.stored_draws[rows].mean(0)
        seen = figures.measured[size, half]
        seen = seen[(seen[:, 3] >= figures.entropy[rows].min()) & (seen[:, 3] <= figures.entropy[rows].max())]
        kept = seen[:, 1].sum() / seen[:, 0].sum()  # what the baseline leaves of the variance, by the draws of vLLM
        equal = np.exp(np.interp(places.log(), filled.log(), MANY.log())).item()  # so many draws fill as many places
        table[str(size)] = {
            "draws": mean[0].item(),
            "head_tail": (mean[half] * kept).item(),
            "without_baseline": mean[half].item(),
            "ratio": (mean[0] / mean[half] / kept).item(),
            "splits": {name: mean[int(share * size)].item() for name, share in SPLITS.items()},
            "best_head": int(mean.argmin()),
            "best": mean.min().item(),
            "topk_bias2": figures.bias2[rows, column].mean().item(),
            "standard_error": {"draws": standard_error(variance[:, 0]), "without_baseline": standard_error(variance[:, half])},
            "stored": {"draws": np.interp(size, MANY, filled).item(), "head_tail": places.item()},
            "draws_same_storage": mean[0].item() * size / equal,
        }
    return table


def standard_error(values: torch.Tensor) -> float:
    """Of the mean."""
    return (values.std() / len(values) ** 0.5).item()


def show(figures: dict) -> None:
    """Prints the tables."""
    parts = [(f"all {figures['positions']}", figures["cache_ids"])]
    parts += [("{:.1f} to {:.1f} nats".format(*part["entropy"]), part["cache_ids"]) for part in figures["quartiles"]]
    names = [f"head {name}" for name in SPLITS]
    shown = Table(
        "entropy of b",
        "ids",
        "draws",
        *names,
        "half, baseline",
        "draws / it",
        "best head",
        "top-K bias^2",
        "stored by draws, half",
        "draws, same storage",
    )
    for title, table in parts:
        shown.add_section()
        for size, row in table.items():
            numbers = [row["draws"], *row["splits"].values(), row["head_tail"], row["ratio"]]
            held = f"{row['stored']['draws']:.1f}, {row['stored']['head_tail']:.1f}"
            last = [str(row["best_head"]), f"{row['topk_bias2']:.3g}", held, f"{row['draws_same_storage']:.3g}"]
            shown.add_row(title, size, *(f"{number:.3g}" for number in numbers), *last)
    console = Console(width=170)
    console.print(shown)
    checked = Table(
        "ids", "head", "measured", "exact", "standard error", "apart, in standard errors", title="measured with vLLM's draws against exact"
    )
    for row in figures["measured"]:
        apart = (row["variance"] - row["exact"]) / row["standard_error"]
        numbers = [f"{row[name]:.3g}" for name in ("variance", "exact", "standard_error")]
        checked.add_row(str(row["cache_ids"]), str(row["head"]), *numbers, f"{apart:+.1f}")
    console.print(checked)


if __name__ == "__main__":
    main()
