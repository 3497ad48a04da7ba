"""What FP8 does to a KL and its gradients, on hidden states and heads of real models, by how large the true KL is.

    examples/smollm2/prepare.py; tools/demo.sh --help      # make the models, where they are missing
    python tools/fp8_error.py --json FILE --plot FILE      # one CPU core, 3 GB, about 10 minutes (--quick: 1)

Each policy of `learner.fp8.logits` and each recipe runs through the door `dense_kl` with the emulation that the tests hold to
TransformerEngine's own rules; the truth is the same door in float32. Tokens are grouped by their true KL. Twice: on states rounded to
bfloat16, as a bfloat16 learner has them, where what is off is the policy's and the recipe's doing; and on float32 states, where it is seen
what rounding them to bfloat16 costs, or does not with two terms.

- smollm2: SmolLM2-135M-Instruct teaches a copy without six of its layers, on the example's prompts. Both have one head, so a student
  that has learned more is had by moving the student's hidden states part of the way to the teacher's: three shares, three levels of KL.
- arithmetic: teacher and student of the demo, trained from scratch apart from each other.

JSON: {POLICY: {RECIPE: {"kl_bias": nats, "grad_hidden_cosine": x, "grad_head_cosine": x, ...}}}: KL by the policy less the true one, the
mean over all tokens; and the cosine between the gradients by the policy and the true ones, in the worst group of tokens of either model.
"kl_bias_over_kl" is the largest of any group, relative; "logit_rmse" and the relative errors of gradients are the worst group's too, and
"groups" has all of them apart. "float32_states" has the same of those, without the head's gradient; its "logit_rmse" is what compares
fp8x2 with bfloat16. The policy "torch bf16" is the CPU's own implementation, which rounds logits to bfloat16, "bf16, float32 gradients"
what is left when nothing but the logits' operands is rounded.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opd.kernels import TORCH, Products, dense_kl, fp8_products
from megatron_opd.kernels.fp8 import FP8Products
from megatron_opd.kernels.fp8_emulation import Emulated, Emulation
from megatron_opd.types import Divergence, VocabShard

CONSOLE = Console(width=150)
POLICIES, RECIPES = ("bf16", "fp8x2", "fp8"), ("current", "delayed", "blockwise", "mxfp8")
EDGES = (0.0, 0.01, 0.1, 1.0, float("inf"))  # nats: of the groups
FEWEST = 16  # tokens of a group that is reported
SHARES = (0.0, 0.75, 0.95)  # of the way from student to teacher
EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Tokens of one pair of models."""

    name: str
    hidden: torch.Tensor  # [T, D] float32
    head: torch.Tensor  # [V, D] float32
    teacher_hidden: torch.Tensor  # [T, E] float32
    teacher_head: torch.Tensor  # [V, E] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out of the door, with gradients of the sum over the tokens that count."""

    kl: torch.Tensor  # [T]
    grad_hidden: torch.Tensor  # [T, D]
    grad_head: torch.Tensor  # [V, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How far one policy is from the truth on tokens of about the same KL."""

    model: str
    kl_from: float
    tokens: int
    kl: float  # the true one, mean
    kl_bias: float
    logit_rmse: float
    grad_hidden_cosine: float
    grad_hidden_error: float  # relative
    grad_head_cosine: float | None = None
    grad_head_error: float | None = None


class _Unquantised(Emulation):
    def quantize(self, x: torch.Tensor, role: object, *, rowwise: bool, columnwise: bool) -> Emulated:
        return Emulated(rowwise=x.float() if rowwise else None, columnwise=x.float() if columnwise else None)


def main() -> None:
    """Measures every policy with every recipe and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG; wants matplotlib")
    parser.add_argument("--smollm2", type=Path, default=EXAMPLES / "smollm2", help="folder with models/ and data/")
    parser.add_argument("--arithmetic", type=Path, default=EXAMPLES / "arithmetic", help="the same of the demo")
    parser.add_argument("--tokens", type=int, default=512, help="of each pair of models")
    parser.add_argument("--divergence", choices=["forward", "reverse"], default="forward", help="whose gradients are compared")
    parser.add_argument("--quick", action="store_true", help="128 tokens: to see that it works, not to quote")
    arguments = parser.parse_args()
    num_tokens = 128 if arguments.quick else arguments.tokens
    pairs = [*smollm2(arguments.smollm2, num_tokens), arithmetic(arguments.arithmetic, num_tokens)]
    figures = measure(pairs, Divergence(kind=arguments.divergence))
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    if arguments.plot:
        draw(figures, arguments.plot)


# -------------------------------------------------------------------------------------------------------------- states
def smollm2(folder: Path, num_tokens: int) -> Iterator[States]:
    """The pruned student and its teacher; the tokens are dealt to the shares of the way."""
    student, teacher = (last_states(folder / "models" / name, folder, num_tokens, chat=True) for name in ("student", "teacher"))
    assert torch.equal(student[1], teacher[1]), "the student's head is the teacher's"
    ways = torch.tensor(SHARES)[torch.arange(len(student[0])) % len(SHARES)][:, None]
    yield States(
        name="smollm2",
        hidden=torch.lerp(student[0], teacher[0], ways),
        head=student[1],
        teacher_hidden=teacher[0],
        teacher_head=teacher[1],
    )


def arithmetic(folder: Path, num_tokens: int) -> States:
    """Teacher and student of the demo."""
    student, teacher = (last_states(folder / "models" / name, folder, num_tokens, chat=False) for name in ("student", "teacher"))
    return States(name="arithmetic", hidden=student[0], head=student[1], teacher_hidden=teacher[0], teacher_head=teacher[1])


@torch.no_grad()
def last_states(model_folder: Path, folder: Path, num_tokens: int, *, chat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the final norm [T, D], of each prompt and the teacher's answer to it, and the head [V, D]; float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "models" / "teacher", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    found: list[torch.Tensor] = []
    lines = (folder / "data" / "heldout.jsonl").read_text().splitlines()
    for line in lines:
        prompt = json.loads(line)["prompt"]
        if chat:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        answer = teacher.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        found.append(model.model(answer).last_hidden_state[0, ids.shape[1] - 1 : -1])
        if sum(map(len, found)) >= num_tokens:
            break
    return torch.cat(found)[:num_tokens], model.lm_head.weight.detach().float()


# --------------------------------------------------------------------------------------------------------- measurement
def measure(pairs: list[States], divergence: Divergence) -> dict:
    """Policy -> recipe -> figures."""
    groups: dict[tuple[str, str], list[Group]] = {}
    of_float32: dict[tuple[str, str], list[Group]] = {}
    for given in pairs:
        for states, found in ((rounded(given), groups), (given, of_float32)):
            truth = through_the_door(states, divergence, None)
            chosen = [(truth.kl >= low) & (truth.kl < high) for low, high in pairwise(EDGES)]
            chosen = [rows for rows in chosen if rows.sum() >= FEWEST]
            true_ones = [through_the_door(states, divergence, None, rows) for rows in chosen] if found is groups else [None] * len(chosen)
            for name, recipe, products, dtype in ways():
                CONSOLE.print(f"{states.name}: {name} {recipe}")
                mixed = through_the_door(states, divergence, products, None, dtype)
                rmse_T = logit_rmse(states, products, dtype)
                for rows, true_one in zip(chosen, true_ones):
                    alone = through_the_door(states, divergence, products, rows, dtype) if true_one else None
                    group = compare(states.name, rows, truth, true_one, mixed, alone, rmse_T)
                    found.setdefault((name, recipe), []).append(group)
    figures: dict = {}
    for (name, recipe), of_way in groups.items():
        figures.setdefault(name, {})[recipe] = summary(of_way) | {"float32_states": summary(of_float32[name, recipe])}
    return figures


def rounded(states: States) -> States:
    """As a bfloat16 learner has them."""
    tensors = {field.name: getattr(states, field.name) for field in fields(states) if field.name != "name"}
    return States(name=states.name, **{name: tensor.bfloat16().float() for name, tensor in tensors.items()})


def ways() -> Iterator[tuple[str, str, Products, torch.dtype]]:
    """Name, recipe, products and dtype of inputs."""
    yield "torch bf16", "-", TORCH, torch.bfloat16
    yield "bf16, float32 gradients", "-", FP8Products(policy="bf16", backend=_Unquantised("current")), torch.float32
    for policy in POLICIES:
        for recipe in RECIPES:
            yield policy, recipe, fp8_products(policy, recipe, "cpu"), torch.float32


def through_the_door(
    states: States,
    divergence: Divergence,
    products: Products | None,
    rows: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """By `products`, or in truth, of the tokens in `rows` or of all."""
    models = [x.to(dtype) for x in (states.hidden, states.head, states.teacher_hidden, states.teacher_head)]
    leaves = [x.clone().requires_grad_() for x in models[:2]]
    way = {"implementation": "te", "products": products} if products not in (None, TORCH) else {"implementation": "chunked"}
    shard = VocabShard(start=0, stop=len(states.head), vocab_size=len(states.head))
    found = dense_kl(*leaves, *models[2:], shard, divergence, rows=rows, chunk_tokens=256, **way)
    found.divergence.sum().backward()
    return Result(kl=found.kl, grad_hidden=leaves[0].grad.float(), grad_head=leaves[1].grad.float())


def logit_rmse(states: States, products: Products, dtype: torch.dtype) -> torch.Tensor:
    """Root of the mean square [T] by which the student's logits are off; a shift of all of them is no error."""
    hidden, head = states.hidden.to(dtype), states.head.to(dtype)
    off = products.head(head, "student").logits(hidden, hidden.new_empty(len(hidden), len(head), dtype=products.dtype(hidden))).float()
    off -= states.hidden @ states.head.t()
    return (off - off.mean(1, keepdim=True)).square_().mean(1).sqrt()


def compare(
    model: str, rows: torch.Tensor, truth: Result, true_one: Result | None, mixed: Result, alone: Result | None, rmse_T: torch.Tensor
) -> Group:
    """Hidden states' gradients come from a batch of all groups, as in training; the head's, which is a sum, from the group alone."""
    hidden, true_hidden = mixed.grad_hidden[rows], truth.grad_hidden[rows]
    return Group(
        model=model,
        kl_from=EDGES[[truth.kl[rows].min() >= low for low in EDGES].index(False) - 1],
        tokens=int(rows.sum()),
        kl=truth.kl[rows].mean().item(),
        kl_bias=(mixed.kl - truth.kl)[rows].mean().item(),
        logit_rmse=rmse_T[rows].square().mean().sqrt().item(),
        grad_hidden_cosine=cosine(hidden, true_hidden),
        grad_hidden_error=((hidden - true_hidden).norm() / true_hidden.norm()).item(),
        grad_head_cosine=cosine(alone.grad_head, true_one.grad_head) if alone else None,
        grad_head_error=((alone.grad_head - true_one.grad_head).norm() / true_one.grad_head.norm()).item() if alone else None,
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors as vectors."""
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()


def summary(groups: list[Group]) -> dict:
    """The worst of all groups, and each of them."""
    tokens = sum(group.tokens for group in groups)
    of_head = {}
    if groups[0].grad_head_cosine is not None:
        of_head = {
            "grad_head_cosine": min(group.grad_head_cosine for group in groups),
            "grad_head_error": max(group.grad_head_error for group in groups),
        }
    return {
        "kl_bias": sum(group.kl_bias * group.tokens for group in groups) / tokens,
        "kl_bias_over_kl": max(abs(group.kl_bias) / group.kl for group in groups),
        "logit_rmse": max(group.logit_rmse for group in groups),
        "grad_hidden_cosine": min(group.grad_hidden_cosine for group in groups),
        "grad_hidden_error": max(group.grad_hidden_error for group in groups),
        **of_head,
        "groups": [asdict(group) for group in groups],
    }


# -------------------------------------------------------------------------------------------------------------- output
def show(figures: dict) -> None:
    """One line per policy and recipe: the worst group of each."""
    columns = "logits", "recipe", "KL bias", "over the KL", "cosine hidden", "cosine head", "error hidden", "error head"
    table = Table(*columns, "float32 states: logit rmse", "cosine hidden", title="worst group of tokens")
    for name, recipes in figures.items():
        for recipe, of in recipes.items():
            cosines = f"{of['grad_hidden_cosine']:.5f}", f"{of['grad_head_cosine']:.5f}"
            errors = f"{of['grad_hidden_error']:.2%}", f"{of['grad_head_error']:.2%}"
            wide = f"{of['float32_states']['logit_rmse']:.4f}", f"{of['float32_states']['grad_hidden_cosine']:.5f}"
            table.add_row(name, recipe, f"{of['kl_bias']:+.5f}", f"{of['kl_bias_over_kl']:.1%}", *cosines, *errors, *wide)
    CONSOLE.print(table)


def draw(figures: dict, path: Path) -> None:
    """KL bias and 1 - cosine of the hidden states' gradients against the true KL, per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    colours = {"torch bf16": "0.6", "bf16": "tab:green", "fp8x2": "tab:blue", "fp8": "tab:red"}
    marks = {"-": "x", "current": "o", "delayed": "s", "blockwise": "^", "mxfp8": "D"}
    for name, colour in colours.items():
        for recipe, of in figures[name].items():
            groups = sorted(of["groups"], key=lambda group: group["kl"])
            style = {"color": colour, "marker": marks[recipe], "ls": "", "ms": 4, "alpha": 0.8, "label": f"{name} {recipe}"}
            left.plot([g["kl"] for g in groups], [max(abs(g["kl_bias"]), 1e-7) for g in groups], **style)
            right.plot([g["kl"] for g in groups], [1 - g["grad_hidden_cosine"] for g in groups], **style)
    left.plot([0.003, 10], [0.003, 10], color="0.8", lw=1)
    left.set(xscale="log", yscale="log", xlabel="true KL, nats", ylabel="bias of the KL, nats", title="grey line: as large as the KL")
    right.axhline(0.002, color="0.8", lw=1)
    right.set(xscale="log", yscale="log", xlabel="true KL, nats", ylabel="1 - cosine, hidden states' gradient", title="grey line: 0.998")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=6)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
