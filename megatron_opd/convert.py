"""Checkpoints between Hugging Face and Megatron-Core: conversion that proves itself, comparison, a look inside.

A conversion holds one parameter at a time, so memory does not grow with the model. What it wrote is read back and compared
with the source byte by byte, and only then takes its name.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_opd.errors import CheckpointError, ConfigError
from megatron_opd.preflight import load_hf_config
from megatron_opd.progress import console
from megatron_opd.types import TensorSpec
from megatron_opd.weights.architectures import architecture, numerics
from megatron_opd.weights.checkpoint import DistributedCheckpoint, write_checkpoint
from megatron_opd.weights.files import SafetensorsFolder, complete, copy_companions, shard_plan, write_shard
from megatron_opd.weights.mapping import Parameter, Rule, extra_states, hf_manifest, rules, stored

COMPANIONS = "huggingface"  # folder inside a Megatron checkpoint with config.json and tokenizer
DTYPES = ("bfloat16", "float16", "float32")
LOGITS_TOLERANCE = 1e-3  # between transformers and Megatron-Core in float32
_PLAN = ".plan"  # file in an unfinished folder: what it is going to be

Advance = Callable[[str, int], None]  # told the stage and how many bytes more are done


def _quiet(stage: str, nbytes: int) -> None:
    return None


class DifferError(CheckpointError):
    """Two folders do not hold the same model."""


class Model(Protocol):
    """A model in either format under its Hugging Face names."""

    folder: Path
    companions: Path  # folder with config.json and tokenizer
    hf_config: Any
    dtype: str  # of every tensor that `get` returns

    def get(self, name: str) -> Tensor:
        """One tensor, read now."""


class HuggingFaceModel:
    """A folder of safetensors."""

    def __init__(self, folder: Path, dtype: str | None = None) -> None:
        """Checks names, shapes and dtypes; `dtype` None is the stored one.

        Raises:
            CheckpointError, ConfigError: the folder is not the model that its config describes, or that is not supported.
        """
        self.folder = self.companions = folder
        self.hf_config = load_hf_config(str(folder))
        self._files = SafetensorsFolder(folder)
        manifest = hf_manifest(self.hf_config, "float32")
        self._files.check(manifest)
        self.dtype = _dtype(folder, [self._files.spec(spec.name) for spec in manifest], dtype)
        self._require_tied_head()

    def get(self, name: str) -> Tensor:
        """One tensor, read now; those read before leave resident memory when their user lets go of them."""
        self._files.close()
        return self._files.get(name).to(getattr(torch, self.dtype))

    def _require_tied_head(self) -> None:
        """A head stored beside a tied embedding must repeat it: readers disagree on which one counts."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if self.hf_config.tie_word_embeddings and head in self._files.names and not same_bits(self.get(head), self.get(embedding)):
            raise CheckpointError(f"{self.folder}: config.json ties {head} to {embedding}, but the stored ones differ; remove one of them")


class MegatronModel:
    """A distributed checkpoint; config.json comes from `companions`, by default the folder in it that a conversion leaves there."""

    def __init__(self, folder: Path, dtype: str | None = None, companions: Path | None = None) -> None:
        """Checks keys, shapes and dtypes; `dtype` None is the stored one.

        Raises:
            CheckpointError, ConfigError: the checkpoint is not the model that the config describes, or that is not supported.
        """
        self.folder, self.companions = folder, companions or folder / COMPANIONS
        self._checkpoint = DistributedCheckpoint(folder)
        if not (self.companions / "config.json").is_file():
            raise CheckpointError(f"{self.companions} holds no config.json; name a Hugging Face folder of this model with --config")
        self.hf_config = load_hf_config(str(self.companions))
        arch = architecture(self.hf_config)
        table = rules(arch)
        self._place = {name: (rule, stored(rule, arch)) for rule in table for name in rule.hf}
        parameters = [parameter for _, parameter in self._place.values()]
        self._checkpoint.check(parameters)
        self.dtype = _dtype(folder, [self._checkpoint.spec(parameter.key) for parameter in parameters], dtype)
        self._held: tuple[Rule, dict[str, Tensor]] | None = None  # the parameter read last, in parts

    def get(self, name: str) -> Tensor:
        """One tensor; its neighbours in the same Megatron parameter are read with it."""
        rule, parameter = self._place[name]
        if self._held is None or self._held[0] is not rule:
            self._held = None  # let go before the next one is read
            parts = rule.layout.part(self._checkpoint.get(parameter))
            self._held = rule, dict(zip(rule.hf, parts, strict=True))
        return self._held[1][name].to(getattr(torch, self.dtype))


def open_model(folder: Path, *, dtype: str | None = None, companions: Path | None = None) -> Model:
    """The model in a folder of either format.

    Raises:
        CheckpointError, ConfigError: see the two classes; or the folder holds neither format.
    """
    if (folder / "metadata.json").is_file():
        return MegatronModel(folder, dtype, companions)
    if any(folder.glob("*.safetensors*")):
        return HuggingFaceModel(folder, dtype)
    what = "holds neither *.safetensors nor a Megatron distributed checkpoint (metadata.json)" if folder.is_dir() else "does not exist"
    raise CheckpointError(f"{folder} {what}; name the folder of a model")


def hf_to_megatron(
    model: HuggingFaceModel,
    target: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    logits: bool = True,
    advance: Advance = _quiet,
) -> str:
    """Writes a distributed checkpoint in the blocks that `tensor` ranks read, with config and tokenizer inside; returns the proof.

    Layers and experts are stored one by one, so it is the same for any number of pipeline stages and of ranks that share the experts.

    Raises:
        CheckpointError, ConfigError: the source is damaged or does not split so, the target exists, the disk is full, or what was
            written differs.
    """
    arch = architecture(model.hf_config)
    arch.require_divisible(tensor=tensor, pipeline=pipeline, expert=expert)
    rule_of = {stored(rule, arch, tensor=tensor): rule for rule in rules(arch)}

    def full(parameter: Parameter) -> Tensor:
        parts = [model.get(name) for name in rule_of[parameter].hf]
        advance("writing", sum(part.nbytes for part in parts))
        return rule_of[parameter].layout.join(parts)

    with _arriving(target, model, f"megatron {model.dtype} {tensor}") as partial:
        write_checkpoint(partial, list(rule_of), full, dtype=model.dtype, objects=extra_states(arch))
        (partial / COMPANIONS).mkdir(exist_ok=True)
        copy_companions(model.companions, partial / COMPANIONS, dtype=model.dtype)
        return prove(model, MegatronModel(partial), logits=logits, advance=advance)


def megatron_to_hf(model: MegatronModel, target: Path, *, logits: bool = True, advance: Advance = _quiet) -> str:
    """Writes a folder of safetensors with config and tokenizer; returns the proof.

    Raises:
        CheckpointError, ConfigError: the source is damaged, the target exists, the disk is full, or what was written differs.
    """
    shards = shard_plan(hf_manifest(model.hf_config, model.dtype))

    def tensors(specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            tensor = model.get(spec.name)
            advance("writing", tensor.nbytes)
            yield spec.name, tensor

    with _arriving(target, model, f"hf {model.dtype}") as partial:
        for file, specs in shards.items():
            if not (partial / file).exists():
                write_shard(partial / file, specs, tensors(specs))
        complete(partial, shards, source=model.companions)
        return prove(model, HuggingFaceModel(partial), logits=logits, advance=advance)


def prove(a: Model, b: Model, *, logits: bool = True, advance: Advance = _quiet) -> str:
    """Compares configs, tensor sets, shapes and every byte, and, where one is Hugging Face's and the other Megatron's, logits.

    Raises:
        DifferError: names the first thing that differs.
    """
    _require_same_config(a, b)
    manifest = hf_manifest(a.hf_config, a.dtype)
    for spec in manifest:
        ours, theirs = a.get(spec.name), b.get(spec.name)
        if not same_bits(ours, theirs):
            raise DifferError(f"{spec.name} differs between {a.folder} and {b.folder}: {_first_difference(ours, theirs)}")
        advance("proving", ours.nbytes)
    proof = f"{len(manifest)} tensors equal byte for byte"
    return f"{proof}; {_compare_logits(a, b)}" if logits and type(a) is not type(b) else proof


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and bits agree, so that a NaN equals itself and 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def digest(model: Model, advance: Advance = _quiet) -> str:
    """128 bits over names, dtype, shapes and bytes, the same for a model in either format and in any number of files."""
    state = hashlib.blake2b(digest_size=16)
    for spec in hf_manifest(model.hf_config, model.dtype):
        tensor = model.get(spec.name)
        state.update(f"{spec.name} {spec.dtype} {spec.shape}\n".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy())
        advance("digesting", tensor.nbytes)
    return state.hexdigest()


def size_of(model: Model) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(spec.shape) for spec in hf_manifest(model.hf_config, "float32")) * getattr(torch, model.dtype).itemsize


def run(arguments: Namespace) -> None:
    """One of the four commands, with a progress bar on a terminal.

    Raises:
        CheckpointError, ConfigError: what is wrong and what to do.
    """
    began, opened = time.monotonic(), {"dtype": arguments.dtype, "companions": arguments.config}
    a = open_model(arguments.source, **opened)
    with _Bar(total=size_of(a)) as bar:
        options = {"logits": arguments.logits, "advance": bar.advance}
        match arguments.action:
            case "hf-to-megatron":
                _require(a, HuggingFaceModel)
                split = {kind: getattr(arguments, f"{kind}_parallel") for kind in ("tensor", "pipeline", "expert")}
                found = hf_to_megatron(a, arguments.target, **split, **options)
            case "megatron-to-hf":
                _require(a, MegatronModel)
                found = megatron_to_hf(a, arguments.target, **options)
            case "verify":
                found = prove(a, open_model(arguments.target, **opened), **options)
            case "inspect":
                found = _description(a)
                if arguments.digest:
                    found += f"\ndigest       {digest(a, bar.advance)}"
    console().print(found, highlight=False, soft_wrap=True)
    if arguments.action != "inspect":
        seconds = time.monotonic() - began
        console().print(f"{arguments.target}: {size_of(a) / 1e9:.3f} GB of {a.dtype}, {seconds:.1f} s", highlight=False, soft_wrap=True)


class _Bar:
    """Bytes, rate and remaining time of each stage; on a terminal only."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._stages: dict[str, Any] = {}
        where = console()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=where, disable=not where.is_terminal)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, stage: str, nbytes: int) -> None:
        """`nbytes` more of the stage are done; a stage that an earlier run did in part ends below its total."""
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, total=self._total)
        self._bar.advance(self._stages[stage], nbytes)


def _require(model: Model, kind: type) -> None:
    if not isinstance(model, kind):
        raise ConfigError(f"{model.folder} is a {type(model).__name__}, wanted a {kind.__name__}; use the command for the other direction")


@contextmanager
def _arriving(target: Path, model: Model, form: str) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well; one that was interrupted is continued."""
    if target.exists():
        raise CheckpointError(f"{target} exists already; name a new folder")
    partial, plan = target.with_name(f"{target.name}.partial"), _plan(model, form)
    if not (partial / _PLAN).is_file() or (partial / _PLAN).read_text() != plan:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _PLAN).write_text(plan)
    _require_room(partial, size_of(model))
    try:
        yield partial
    except DifferError:
        shutil.rmtree(partial)  # what is there cannot be trusted to be continued
        raise
    except OSError as error:
        free = shutil.disk_usage(partial).free
        raise CheckpointError(
            f"{partial} cannot be written: {error}; {free / 1e9:.2f} GB are free; run the command again to continue, or remove the folder"
        ) from error
    (partial / _PLAN).unlink()
    os.rename(partial, target)


def _plan(model: Model, form: str) -> str:
    """What tells whether an interrupted conversion may be continued: the same result of the same files."""
    files = [path for path in sorted(model.folder.iterdir()) if path.is_file()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([str(model.folder.resolve()), form, numerics(model.hf_config), stats])


def _require_room(folder: Path, size: int) -> None:
    written = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if size - written > free:
        raise CheckpointError(
            f"the disk of {folder} is too full: {free / 1e9:.2f} GB are free, {(size - written) / 1e9:.2f} GB more are needed"
        )


def _dtype(folder: Path, specs: Sequence[TensorSpec], wanted: str | None) -> str:
    """The dtype of all tensors; a difference among the stored ones is for the user to settle."""
    first = specs[0]
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise CheckpointError(f"{folder}: {spec.name} has dtype {spec.dtype}; only {', '.join(DTYPES)} are supported")
        if wanted is None and spec.dtype != first.dtype:
            raise CheckpointError(f"{folder}: {spec.name} is {spec.dtype}, {first.name} is {first.dtype}; name one for all with --dtype")
    return wanted or first.dtype


def _require_same_config(a: Model, b: Model) -> None:
    ours, theirs = numerics(a.hf_config), numerics(b.hf_config)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise DifferError(f"{name} is {ours.get(name)} in {a.companions} and {theirs.get(name)} in {b.companions}")
    if a.dtype != b.dtype:
        raise DifferError(f"{a.folder} is {a.dtype}, {b.folder} is {b.dtype}; name one for both with --dtype to compare after rounding")


def _first_difference(a: Tensor, b: Tensor) -> str:
    unequal = (a != b).nonzero()
    if not len(unequal):
        return "bits that mean the same number, as 0 and -0 or two kinds of NaN"
    index = tuple(unequal[0].tolist())
    return f"{len(unequal)} of {a.numel()} numbers, the first at {list(index)}: {a[index].item()} and {b[index].item()}"


def _compare_logits(a: Model, b: Model) -> str:
    """Both models compute in a process of their own, after the bytes are proven; left out where they do not fit."""
    hf, megatron = (a, b) if isinstance(a, HuggingFaceModel) else (b, a)
    need, available = int(1.3 * size_of(a) / getattr(torch, a.dtype).itemsize * 4), _available_bytes()
    if need > available:
        return f"logits not compared: {need / 1e9:.0f} GB are needed, {available / 1e9:.0f} GB available"
    from megatron_opd.model.checkpoint import logits_gap

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            largest, gap = pool.submit(logits_gap, str(hf.folder), str(hf.companions), str(megatron.folder)).result()
        except BrokenProcessPool as error:
            raise CheckpointError(
                "the process that compares logits died, perhaps for lack of memory; leave them out with --no-logits"
            ) from error
    if not gap <= LOGITS_TOLERANCE:
        raise DifferError(f"logits of {hf.folder} by transformers and of {megatron.folder} by Megatron-Core differ by {gap:.1e}")
    return f"logits up to {largest:.1f} agree within {gap:.1e}"


def _available_bytes() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10


def _description(model: Model) -> str:
    arch, rope = architecture(model.hf_config), model.hf_config.rope_parameters
    count = size_of(model) // getattr(torch, model.dtype).itemsize
    windows = sorted({window for window in arch.windows if window is not None})
    facts = {
        "format": "Hugging Face safetensors" if isinstance(model, HuggingFaceModel) else "Megatron distributed checkpoint (torch_dist)",
        "family": model.hf_config.model_type,
        "parameters": f"{count:,}",
        "size": f"{size_of(model) / 1e9:.3f} GB of {model.dtype} in {len(hf_manifest(model.hf_config, model.dtype))} tensors",
        "layers": f"{arch.layers}, hidden {arch.hidden}, feed-forward {arch.ffn}",
        "attention": f"{arch.heads} heads of {arch.head_dim} in {arch.groups} groups" + (f", window {windows[0]}" if windows else ""),
        "vocabulary": f"{arch.vocab}, {'tied' if arch.tied else 'untied'} head",
        "positions": f"{model.hf_config.max_position_embeddings}, rope {rope['rope_type']}, theta {rope['rope_theta']:g}",
        "splits over": f"{_divisors(math.gcd(arch.heads, arch.groups, arch.ffn))} tensor ranks, up to {arch.layers} pipeline stages",
    }
    if arch.experts is not None:
        facts["experts"] = (
            f"{arch.experts.count}, of which {arch.experts.active} for each token; split over {_divisors(arch.experts.count)} ranks"
        )
    return "\n".join(f"{name:12} {fact}" for name, fact in facts.items())


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
