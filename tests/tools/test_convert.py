"""A conversion proves itself, holds little memory, and leaves nothing half-written; each fault has one clear message."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opd import convert
from megatron_opd.cli import main
from megatron_opd.convert import HuggingFaceModel, MegatronModel, digest, hf_to_megatron, megatron_to_hf, open_model, prove
from megatron_opd.errors import CheckpointError, ConfigError
from megatron_opd.weights.checkpoint import write_checkpoint
from tests.model import tiny
from tests.model.conftest import MODELS
from tests.ranks import run_ranks

pytestmark = pytest.mark.engines

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
PEAK = (
    "import sys, resource; sys.argv[0:1] = ['convert', 'convert']; from megatron_opd.cli import main; main();"
    "print('peak', [int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
)
LAYOUTS = {2: [{"tensor": 2}, {"pipeline": 2}], 4: [{"tensor": 2, "pipeline": 2, "sequence_parallel": True}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def folders(root) -> dict[str, Path]:
    return {name: Path(tiny.write_model(root / name, name.split("_")[0], **overrides)) for name, overrides in MODELS.items()}


@pytest.fixture(scope="module")
def checkpoints(root, folders) -> dict[str, Path]:
    """Each model converted, cut for 2 ranks."""
    targets = {name: root / f"{name}-megatron" for name in folders}
    for name, folder in folders.items():
        hf_to_megatron(HuggingFaceModel(folder), targets[name], tensor=2, logits=False)
    return targets


@pytest.fixture
def source(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["qwen3_untied"], tmp_path / "source"))


@pytest.fixture
def checkpoint(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["qwen3_untied"], tmp_path / "checkpoint"))


def to_megatron(source, target, dtype=None, **options):
    return hf_to_megatron(HuggingFaceModel(source, dtype), target, logits=False, **options)


def edit(folder, change):
    """Rewrites the folder's only file of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_byte_is_equal(name, folders, checkpoints, tmp_path):
    proof = megatron_to_hf(MegatronModel(checkpoints[name]), tmp_path / "back", logits=False)
    first, last = load_file(folders[name] / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    first.pop("lm_head.weight", None) if HuggingFaceModel(folders[name]).hf_config.tie_word_embeddings else None
    assert proof == f"{len(first)} tensors equal byte for byte"
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert digest(open_model(folders[name])) == digest(open_model(checkpoints[name])) == digest(open_model(tmp_path / "back"))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(tiny.read_model(str(tmp_path / "back"))(ids).logits, tiny.read_model(str(folders[name]))(ids).logits)


def _loaded(folders, checkpoints, layouts):
    from megatron_opd.model.parallel import ParallelConfig, initialize
    from tests.model.ranks_of import Loaded

    found = []
    for sizes in layouts:
        parallel = ParallelConfig(**sizes)
        initialize(parallel, device="cpu", seed=0)
        for name, folder in folders.items():
            found.append([name, Loaded(folder, parallel, checkpoint=checkpoints[name]).logits(tiny.BATCHES)])
    return found


@pytest.mark.engines
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_megatron_loads_the_checkpoint_in_any_layout_and_computes_the_logits_of_transformers(ranks, folders, checkpoints):
    names = {name: str(folder) for name, folder in folders.items()}
    found = run_ranks(_loaded, ranks, names, {name: str(path) for name, path in checkpoints.items()}, LAYOUTS[ranks], timeout_s=240)
    compared = 0
    for name, logits in (entry for by_rank in found for entry in by_rank if entry[1] is not None):
        model = tiny.read_model(names[name])
        with torch.no_grad():
            says = torch.cat([model(ids[None]).logits[0] for batch in tiny.BATCHES for ids in tiny.sequences(batch)])
        torch.testing.assert_close(logits, says, atol=1e-4, rtol=0)
        compared += 1
    assert compared >= len(names) * len(LAYOUTS[ranks])


def _saved_by_megatron(folder, target):
    from megatron.core import dist_checkpointing

    from megatron_opd.model.build import gpt_of
    from megatron_opd.model.parallel import ParallelConfig, initialize
    from tests.model.ranks_of import Loaded

    multiprocessing.current_process()._config["daemon"] = False  # Megatron's writer starts a process of its own
    parallel = ParallelConfig(tensor=2)
    initialize(parallel, device="cpu", seed=0)
    dist_checkpointing.save(gpt_of(Loaded(folder, parallel).model).sharded_state_dict(), target)


@pytest.mark.engines
def test_a_checkpoint_that_megatron_saved_with_a_padded_vocabulary_is_read(folders, tmp_path):
    (tmp_path / "saved").mkdir()
    run_ranks(_saved_by_megatron, 2, str(folders["qwen3_untied"]), str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=r"holds no config\.json; name a Hugging Face folder of this model with --config"):
        MegatronModel(tmp_path / "saved")
    model = MegatronModel(tmp_path / "saved", companions=folders["qwen3_untied"])
    assert prove(model, HuggingFaceModel(folders["qwen3_untied"]), logits=False).endswith("equal byte for byte")


@pytest.mark.engines
def test_the_command_proves_logits_too_and_inspects(folders, tmp_path, monkeypatch, capsys):
    done = run("hf-to-megatron", folders["mistral"], tmp_path / "out")
    assert done.returncode == 0 and "agree within" in done.stdout, done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["megatron-opd", "convert", "inspect", str(tmp_path / "out"), "--digest"])
        main()
        seen = capsys.readouterr().out
        patch.setattr(sys, "argv", ["megatron-opd", "convert", "verify", str(folders["qwen2"]), str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="DifferError: "):
            main()
    assert "6 heads of 8 in 2 groups, window 9" in seen and "rope yarn" in seen
    assert digest(open_model(folders["mistral"])) in seen


@pytest.mark.engines
def test_logits_tell_a_wrong_config_that_the_bytes_cannot(folders, checkpoints, tmp_path):
    from megatron_opd.model.checkpoint import logits_gap

    wrong = json.loads((folders["qwen2_window"] / "config.json").read_text()) | {"sliding_window": 6}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    for config, low, high in ((folders["qwen2_window"], 0, 1e-4), (tmp_path, 1e-2, 100)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            largest, gap = pool.submit(logits_gap, str(folders["qwen2_window"]), str(config), str(checkpoints["qwen2_window"])).result()
        assert largest > 1 and low <= gap < high


def run(*words, **options):
    return subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True, timeout=200, env=ENVIRONMENT, **options)


def test_another_dtype_is_rounded_to_once(source, tmp_path):
    to_megatron(source, tmp_path / "half", dtype="bfloat16")
    assert MegatronModel(tmp_path / "half").dtype == "bfloat16"
    with pytest.raises(CheckpointError, match=r"float32, .* is bfloat16; name one for both with --dtype"):
        prove(open_model(source), open_model(tmp_path / "half"), logits=False)
    prove(open_model(source, dtype="bfloat16"), open_model(tmp_path / "half"), logits=False)


# ----------------------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "holds more, unknown to the model"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \[3\], wanted \[48\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48).half()}), "model.norm.weight is float16, .* is float32; name one"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48).char()}), "model.norm.weight has dtype I8; only bfloat16"),
    ],
)
def test_a_wrong_tensor_is_named_before_anything_is_written(source, tmp_path, change, message):
    edit(source, change)
    with pytest.raises(CheckpointError, match=message):
        to_megatron(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_that_two_files_hold_is_named(source):
    tensors = load_file(source / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"], "lm_head.weight": tensors["lm_head.weight"]}, source / "b.safetensors")
    places = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "b.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"holds (model.norm|lm_head).weight twice: in .*safetensors and in .*safetensors"):
        open_model(source)


def test_a_head_that_contradicts_its_tie_is_refused(folders, tmp_path):
    source = Path(shutil.copytree(folders["qwen3"], tmp_path / "source"))
    edit(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the stored ones differ"):
        open_model(source)


def test_truncated_files_are_named_in_both_formats(source, checkpoint):
    for path in (source / "model.safetensors", checkpoint / "__0_0.distcp"):
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
            open_model(path.parent)


def test_a_flipped_bit_is_found_in_its_tensor(source, checkpoint):
    def flip(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[5, 7] ^= 1

    edit(source, flip)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight differs .* 1 of 3456 numbers, the first at \[5, 7\]: "):
        prove(open_model(source), open_model(checkpoint), logits=False)


def test_a_checkpoint_of_another_model_or_format_is_refused(checkpoint, folders):
    with pytest.raises(
        CheckpointError, match=r"decoder\.layers\.self_attention\.linear_qkv\.weight has shape \[4, 192, 48\], wanted \[4, 80, 48\]"
    ):
        MegatronModel(checkpoint, companions=folders["llama_bias"])
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="format 'zarr'; only torch_dist"):
        open_model(checkpoint)


def test_what_is_no_model_and_what_exists_already_is_refused(source, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds neither"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint exists already; name a new folder"):
        to_megatron(source, checkpoint)
    for split, message in (
        ({"tensor": 3}, "tensor_parallel=3 does not"),
        ({"pipeline": 9}, "pipeline_parallel=9 exceeds"),
        ({"expert": 2}, "has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_megatron(source, tmp_path / "out", **split)


def test_a_full_disk_is_said_before_and_during_writing(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(CheckpointError, match=r"too full: 0\.00 GB are free"):
            to_megatron(source, tmp_path / "out")
    for action, path in (("hf-to-megatron", source), ("megatron-to-hf", None)):
        if path is None:
            to_megatron(source, tmp_path / "whole")
        limited = run(action, path or tmp_path / "whole", tmp_path / action, "--no-logits", preexec_fn=_small_files)
        assert limited.returncode == 1 and "cannot be written: " in limited.stderr, limited.stderr
        assert not (tmp_path / action).exists()
        assert run(action, path or tmp_path / "whole", tmp_path / action, "--no-logits").returncode == 0
        assert not (tmp_path / f"{action}.partial").exists()


def _small_files():
    """What the kernel answers to a write past the limit reaches a program as a full disk would: as an OSError."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_an_interrupted_conversion_leaves_no_target_and_is_continued(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "write_checkpoint", lambda *a, **k: write_checkpoint(*a, **k, file_bytes=100_000))
    written = []

    def interrupt(stage, nbytes):
        written.append(nbytes)
        if len(written) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_megatron(source, tmp_path / "out", advance=interrupt)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    again = []
    to_megatron(source, tmp_path / "out", advance=lambda stage, nbytes: again.append(nbytes) if stage == "writing" else None)
    total = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    assert 0 < sum(again) < total, "what was finished is not written again"
    assert not list(tmp_path.glob("out.partial")) and not list((tmp_path / "out").glob(".*.done"))
    prove(open_model(source), open_model(tmp_path / "out"), logits=False)


def test_what_was_written_wrong_never_gets_its_name(source, tmp_path, monkeypatch):
    real = MegatronModel.get
    monkeypatch.setattr(MegatronModel, "get", lambda self, name: real(self, name) + (name == "model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight differs"):
        to_megatron(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# ----------------------------------------------------------------------------------------------------------------- memory
def test_memory_stays_below_two_of_the_largest_tensors_and_1_gib(tmp_path):
    """1 GB in 5 files, both ways, each in a process of its own; in a process that held it all this would not hold."""
    config = tiny.config("llama", hidden_size=1024, intermediate_size=3584, num_hidden_layers=32, num_attention_heads=8, vocab_size=40_003)
    source = big_model(tmp_path / "big", config)
    largest, total = 40_003 * 1024 * 2, sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total > 0.95e9
    for words in (("hf-to-megatron", source, tmp_path / "m"), ("megatron-to-hf", tmp_path / "m", tmp_path / "back")):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, words), "--no-logits"], capture_output=True, text=True, timeout=200, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("peak ")[1])
        assert peak < 2 * largest + (1 << 30), f"{words[0]}: {peak / 1e6:.0f} MB"
    shutil.rmtree(tmp_path)


def big_model(folder, config):
    """Random bfloat16 weights, written shard by shard."""
    from megatron_opd.weights.files import complete, shard_plan, write_shard
    from megatron_opd.weights.mapping import hf_manifest

    folder.mkdir()
    (folder / "start").mkdir()
    config.save_pretrained(folder / "start")
    shards = shard_plan(hf_manifest(config, "bfloat16"), 250 << 20)
    for file, specs in shards.items():
        write_shard(folder / file, specs, ((spec.name, torch.randn(spec.shape, dtype=torch.bfloat16)) for spec in specs))
    complete(folder, shards, source=folder / "start")
    shutil.rmtree(folder / "start")
    return folder
