"""What it costs to convert a large checkpoint. CPU only: disk for three times the model, memory for two of its largest tensors and 1 GiB.

    python tools/bench_convert.py --json FILE [--layers 32] [--folder FOLDER]

A checkpoint of the shape of Llama 3.1 8B (16 GB of bfloat16 with all 32 layers) is written shard by shard, of random weights. Then, each
in a process of its own: `cp` of its files, `megatron-opd convert hf-to-megatron`, and `megatron-to-hf` of what came out. A conversion
writes, then proves: it reads source and target back and compares every byte. Both parts are timed; cp only writes, and its copy is
put to disk (sync) as the conversions put theirs. Logits are not compared: at this size they take 40 GB of memory.

JSON: {"bytes", "layers", "bound_bytes": two of the largest tensors + 1 GiB, "cp": {"seconds", "bytes_per_s"}, "hf-to-megatron":
{"seconds", "writing_seconds", "bytes_per_s", "writing_bytes_per_s", "peak_rss_bytes"}, "megatron-to-hf": {the same}}
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from megatron_opd.convert import HuggingFaceModel, MegatronModel, hf_to_megatron, megatron_to_hf, size_of
from megatron_opd.types import TensorSpec
from megatron_opd.weights.files import write_folder
from megatron_opd.weights.mapping import hf_manifest

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
LARGEST_BYTES = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
TENSOR_RANKS = 4  # for whom the Megatron checkpoint is cut


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(Path(folder), arguments.layers)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def measure(folder: Path, layers: int) -> dict:
    """All figures; at most three checkpoints stand on the disk at a time."""
    source, checkpoint, back = folder / "hf", folder / "megatron", folder / "back"
    write_model(source, layers)
    size = size_of(HuggingFaceModel(source))
    figures = {"bytes": size, "layers": layers, "bound_bytes": 2 * LARGEST_BYTES + (1 << 30)}
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, folder / "copy"], check=True)
    subprocess.run(["sync", *(folder / "copy").iterdir()], check=True)
    figures["cp"] = {"seconds": time.monotonic() - began, "bytes_per_s": size / (time.monotonic() - began)}
    shutil.rmtree(folder / "copy")
    for name, (given, target) in {"hf-to-megatron": (source, checkpoint), "megatron-to-hf": (checkpoint, back)}.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(convert, name, given, target).result()
        rates = {"bytes_per_s": size / found["seconds"], "writing_bytes_per_s": size / found["writing_seconds"]}
        figures[name] = found | rates
        shutil.rmtree(given)
    return figures


def write_model(folder: Path, layers: int) -> None:
    """Random bfloat16 weights: pieces of one large sample, since drawing 8 billion numbers takes longer than all the rest."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False)
    start = folder.with_name("start")
    config.save_pretrained(start)
    manifest = hf_manifest(config, "bfloat16")
    write_folder(folder, manifest, pieces(manifest), source=start)


def pieces(manifest: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    """A sample of 2^25 numbers again and again, from another place for each tensor."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.empty(1 << 25, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for number, spec in enumerate(manifest):
        count = torch.Size(spec.shape).numel()
        shifted = sample.roll(-7919 * number)
        yield spec.name, shifted.repeat(-(-count // len(sample)))[:count].view(spec.shape)


def convert(name: str, source: Path, target: Path) -> dict[str, float]:
    """Converts and proves; seconds in all and until proving began, and the peak of this process's memory."""
    torch.set_num_threads(1)
    proving: list[float] = []

    def advance(stage: str, nbytes: int) -> None:
        if stage == "proving" and not proving:
            proving.append(time.monotonic())

    began = time.monotonic()
    if name == "hf-to-megatron":
        hf_to_megatron(HuggingFaceModel(source), target, tensor=TENSOR_RANKS, logits=False, advance=advance)
    else:
        megatron_to_hf(MegatronModel(source), target, logits=False, advance=advance)
    seconds = time.monotonic() - began
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {"seconds": seconds, "writing_seconds": proving[0] - began, "peak_rss_bytes": int(peak.split()[1]) << 10}


def show(figures: dict) -> None:
    """One table."""
    title = f"{figures['bytes'] / 1e9:.1f} GB, {figures['layers']} layers, {os.cpu_count()} cores"
    table = Table("", "seconds", "MB/s", "of it writing, s", "peak RSS, GB", title=title)
    table.add_row("cp", f"{figures['cp']['seconds']:.1f}", f"{figures['cp']['bytes_per_s'] / 1e6:.0f}", "", "")
    for name in ("hf-to-megatron", "megatron-to-hf"):
        found = figures[name]
        cells = [f"{found['seconds']:.1f}", f"{found['bytes_per_s'] / 1e6:.0f}", f"{found['writing_seconds']:.1f}"]
        table.add_row(name, *cells, f"{found['peak_rss_bytes'] / 1e9:.2f} of {figures['bound_bytes'] / 1e9:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
