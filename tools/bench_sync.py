"""What a weight update costs. Two CPU cores, about 5 minutes, 6 GB of memory, 3 GB of disk in the temporary folder.

    python tools/bench_sync.py --json FILE [--sizes 50MB 270MB 1GB] [--rounds 5]

Synthetic models (random bfloat16 weights in the tensors of a Hugging Face family), two processes on the loopback, everything in
this run and in turn, round by round:

- raw: one torch.distributed broadcast (gloo) of the same bytes as one flat tensor; the receiver knows what comes;
- ours: `BroadcastSender` to `BroadcastReceiver`, gathering, digests on both ends, hand-shakes and acknowledgement included;
- two stages: ours from two processes at once, as from two pipeline stages, each of which has half of the layers; here they share the cores;
- per tensor: one broadcast for each tensor;
- disk: safetensors written by one process and read by the other, without fsync, so from the page cache;
- delta: ours with `delta`, after each weight has moved by 1e-6, a learning rate's worth of an Adam step, beneath its rounding.

Then a vLLM engine on the model, with requests running, takes updates from a sender process. Requests stand still in the gap
between two of their tokens around the swap, beyond the median gap; transfer is the time from the engine's call until the new
weights are there, verified and loaded. Keys and values are kept (`rollout.keep_kv`): to compute them anew under the new weights is
the price of another choice, and grows with what is running.

JSON: {"270MB": {"ours_over_raw": ratio of seconds (1.25 is 0.8 of the bandwidth), "per_tensor_over_raw", "disk_over_raw",
"delta_over_raw", "two_stages_over_raw", "standstill_over_transfer", "delta_bytes_over_full", "raw_bytes_per_s", "transfer_seconds",
"standstill_seconds"}}
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from megatron_opd.config import RolloutConfig
from megatron_opd.runtime.environment import environment
from megatron_opd.types import JoinTransport, Needs
from megatron_opd.weights.files import write_folder
from megatron_opd.weights.mapping import hf_manifest
from megatron_opd.weights.stages import StagedReceiver
from megatron_opd.weights.transport import BroadcastReceiver, BroadcastSender

SIZES = {
    "50MB": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 8192, "num_attention_heads": 8},
    "270MB": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152, "num_attention_heads": 9},
    "1GB": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "vocab_size": 49152, "num_attention_heads": 16},
}
WAYS = ("raw", "ours", "two_stages", "per_tensor", "disk", "delta")
DTYPE, BUCKET_BYTES, TIMEOUT_S, MOVE = "bfloat16", 16 << 20, 120.0, 1e-6
RUNNING, PROMPT_TOKENS, UPDATES = 4, 8, 5


def main() -> None:
    """Measures each size and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.update(environment("cpu"))
    torch.set_num_threads(1)
    figures = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", **SIZES[size])
            figures[size] = transfers(folder, arguments.rounds) | asyncio.run(standstill(folder))
        show(size, figures[size])
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))


def write_model(folder: Path, **sizes: int) -> None:
    """A llama of that shape, of random weights, without a tokenizer."""
    config = LlamaConfig(
        **sizes, num_key_value_heads=sizes["num_attention_heads"] // 3 or 1 if sizes["num_attention_heads"] % 3 == 0 else 4,
        max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=0, bos_token_id=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    source = folder.with_name("source")
    config.save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    manifest = hf_manifest(config, DTYPE)
    tensors = ((s.name, torch.empty(s.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)) for s in manifest)
    write_folder(folder, manifest, tensors, source=source)


def read_model(folder: str) -> tuple[tuple, dict[str, torch.Tensor]]:
    """Manifest and tensors, in the manifest's order."""
    manifest = hf_manifest(AutoConfig.from_pretrained(f"{folder}/model"), DTYPE)
    stored = load_file(f"{folder}/model/model.safetensors")
    return manifest, {spec.name: stored[spec.name] for spec in manifest}


# ------------------------------------------------------------------------------------------------------------- transfers
class End:
    """One of the two processes: what it needs for every way, made once."""

    def __init__(self, rank: int, folder: str, pipe: Connection) -> None:
        self.rank, self.folder, self.pipe = rank, folder, pipe
        self.manifest, self.tensors = read_model(folder)
        self.flat = torch.cat([tensor.view(torch.uint8).flatten() for tensor in self.tensors.values()])  # zeros would be one page, in cache
        self.size = self.flat.nbytes
        store = dist.FileStore(f"{folder}/store", 2)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=TIMEOUT_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self.group = dist.ProcessGroupGloo(store, rank, 2, options)
        self.version = 0

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.group.broadcast([tensor], options).wait(timedelta(seconds=TIMEOUT_S))

    def raw(self) -> None:
        """One flat tensor."""
        self.broadcast(self.flat)

    def per_tensor(self) -> None:
        """One after the other."""
        for tensor in self.tensors.values():
            self.broadcast(tensor)


class Source(End):
    """Rank 0."""

    def __init__(self, folder: str, pipe: Connection) -> None:
        super().__init__(0, folder, pipe)
        self.senders = {}
        for way in ("ours", "delta"):
            self.senders[way] = BroadcastSender(
                host="127.0.0.1", device="cpu", bucket_bytes=BUCKET_BYTES, timeout_s=TIMEOUT_S, delta=way == "delta"
            )
            pipe.send(self.senders[way].listen(1))
        self.half = Half(self.manifest, self.tensors, 0)
        self.beside, theirs = multiprocessing.get_context("spawn").Pipe()
        self.second = multiprocessing.get_context("spawn").Process(target=second_stage, args=(folder, theirs), daemon=True)
        self.second.start()
        first, other = self.half.sender.listen(1), self.beside.recv()
        self.half.sender.name_others([other])
        pipe.send(first)
        self.masters = {name: tensor.float() for name, tensor in self.tensors.items()}
        generator = torch.Generator().manual_seed(1)
        for master in self.masters.values():  # somewhere between two bfloat16 numbers, as after some training
            master.mul_(1 + (torch.rand(master.shape, generator=generator) - 0.5) / 256)
        self.moved = generator

    def ours(self) -> None:
        """The product."""
        self.senders["ours"].send(self.version, self.manifest, self.tensors.items())

    def two_stages(self) -> None:
        """The product, from two processes."""
        self.beside.send(self.version)
        self.half.send(self.version)

    def delta(self) -> None:
        """The product, changes alone."""
        self.senders["delta"].send(self.version, self.manifest, self.step.items())

    def prepare(self, way: str) -> None:
        """What is not part of the measured time."""
        if way == "delta":
            for master in self.masters.values():
                master.add_(torch.randint(0, 2, master.shape, generator=self.moved).mul_(2).sub_(1), alpha=MOVE)
            self.step = {name: master.bfloat16() for name, master in self.masters.items()}

    def disk(self) -> None:
        """Writes."""
        shutil.rmtree(f"{self.folder}/disk", ignore_errors=True)
        os.mkdir(f"{self.folder}/disk")
        save_file(self.tensors, f"{self.folder}/disk/model.safetensors")
        self.pipe.send("written")


class Half:
    """What one of two pipeline stages sends."""

    def __init__(self, manifest: tuple, tensors: dict[str, torch.Tensor], stage: int) -> None:
        middle = len(manifest) // 2
        self.manifest = manifest[middle:] if stage else manifest[:middle]
        self.tensors = tensors
        self.sender = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=BUCKET_BYTES, timeout_s=TIMEOUT_S)

    def send(self, version: int) -> None:
        """To the one receiver."""
        self.sender.send(version, self.manifest, ((spec.name, self.tensors[spec.name]) for spec in self.manifest))


def second_stage(folder: str, pipe: Connection) -> None:
    """A process that sends the second half whenever it is told a version."""
    torch.set_num_threads(1)
    half = Half(*read_model(folder), 1)
    pipe.send(half.sender.listen(1))
    while (version := pipe.recv()) is not None:
        half.send(version)


class Sink(End):
    """Rank 1."""

    def __init__(self, folder: str, pipe: Connection) -> None:
        super().__init__(1, folder, pipe)
        self.receivers = {
            way: BroadcastReceiver(address=pipe.recv(), rank=1, world_size=2, device="cpu", timeout_s=TIMEOUT_S)
            for way in ("ours", "delta")
        }
        self.receivers["two_stages"] = StagedReceiver(address=pipe.recv(), rank=1, world_size=2, device="cpu", timeout_s=TIMEOUT_S)

    def ours(self) -> None:
        """The product."""
        self.receive("ours")

    def two_stages(self) -> None:
        """The product, from two processes."""
        self.receive("two_stages")

    def delta(self) -> None:
        """The product, changes alone."""
        self.receive("delta")

    def receive(self, way: str) -> None:
        """The tensors stand in the buckets, as those of raw stand in its flat tensor: to load them is another matter."""
        receiver = self.receivers[way]
        for _ in receiver.receive(receiver.announced(self.version, self.manifest)):
            continue

    def disk(self) -> None:
        """Reads."""
        assert self.pipe.recv() == "written"
        for name, tensor in load_file(f"{self.folder}/disk/model.safetensors").items():
            self.tensors[name].copy_(tensor)


def sink(folder: str, pipe: Connection) -> None:
    """The second process: takes part in whatever the first one names."""
    torch.set_num_threads(1)
    end = Sink(folder, pipe)
    while (way := pipe.recv()) != "stop":
        getattr(end, way)()
        end.version += 1
        pipe.send("done")


def transfers(folder: str, rounds: int) -> dict[str, float]:
    """Ratios of the medians over `rounds`, after one round that warms up."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=sink, args=(folder, theirs), daemon=True)
    process.start()
    source = Source(folder, ours)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    patched = 0.0
    for _ in range(rounds + 1):
        for way in WAYS:
            source.prepare(way)
            ours.send(way)
            start = time.perf_counter()
            getattr(source, way)()
            assert ours.poll(TIMEOUT_S) and ours.recv() == "done"
            seconds[way].append(time.perf_counter() - start)
            source.version += 1
        patched = source.senders["delta"].sent_bytes / source.size
    ours.send("stop")
    source.beside.send(None)
    process.join(10)
    source.second.join(10)
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    ratios = {f"{way}_over_raw": medians[way] / medians["raw"] for way in WAYS if way != "raw"}
    return ratios | {"delta_bytes_over_full": patched, "raw_bytes_per_s": source.size / medians["raw"]}


# ------------------------------------------------------------------------------------------------------------ standstill
def updates(folder: str, pipe: Connection) -> None:
    """A process that sends the model whenever it is told a version."""
    torch.set_num_threads(1)
    manifest, tensors = read_model(folder)
    sender = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=BUCKET_BYTES, timeout_s=TIMEOUT_S)
    pipe.send(sender.listen(1))
    while (version := pipe.recv()) is not None:
        sender.send(version, manifest, tensors.items())
    sender.close()


async def standstill(folder: str) -> dict[str, float]:
    """Medians over some updates of an engine that generates all the while."""
    from megatron_opd.rollout.engine import EngineSettings, VLLMRollout

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=updates, args=(folder, theirs), daemon=True)
    process.start()
    rollout = RolloutConfig(dtype=DTYPE, max_running=RUNNING, kv_cache_bytes=512 << 20, keep_kv=True)
    settings = EngineSettings(rollout=rollout, path=f"{folder}/model", needs=Needs(), max_model_len=4000, timeout_s=TIMEOUT_S)
    engine = await VLLMRollout.start(settings)
    await engine.join_transport(JoinTransport(address=ours.recv(), first_rank=1, world_size=2))
    stamps: list[list[float]] = [[] for _ in range(RUNNING)]
    running = [asyncio.create_task(stamped(engine, number, stamps[number])) for number in range(RUNNING)]
    still, transfer = [], []
    for version in range(1, UPDATES + 2):
        await asyncio.sleep(1.0)
        ours.send(version)
        start = time.perf_counter()
        seconds = await engine.receive_weights(version)
        swapped = start + seconds["receive"]
        await asyncio.sleep(0.5)
        if version > 1:
            still.append(max(gap_around(times, swapped) for times in stamps))
            transfer.append(seconds["receive"])
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    ours.send(None)
    await engine.close()
    process.join(10)
    return {
        "standstill_over_transfer": statistics.median(s / t for s, t in zip(still, transfer)),
        "standstill_seconds": statistics.median(still),
        "transfer_seconds": statistics.median(transfer),
    }


async def stamped(engine: object, number: int, times: list[float]) -> None:
    """Generates for ever, and notes when each token came."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=3000, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
    prompt = np.arange(10 + number, 10 + number + PROMPT_TOKENS).tolist()
    for attempt in range(1000):
        async for _ in engine._engine.generate(TokensPrompt(prompt_token_ids=prompt), params, f"{number}-{attempt}"):
            times.append(time.perf_counter())


def gap_around(times: list[float], swapped: float) -> float:
    """Seconds between the two tokens around the swap, beyond the median gap of the request."""
    stamps = np.asarray(times)
    gaps = np.diff(stamps)
    near = (stamps[1:] > swapped) & (stamps[:-1] < swapped + 0.3)
    return float(max(gaps[near].max() - np.median(gaps), 0.0))


def show(size: str, figures: dict[str, float]) -> None:
    """One table."""
    table = Table("figure", "value", title=size)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
