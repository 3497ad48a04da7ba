import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_opd.errors import CheckpointError
from megatron_opd.types import TensorSpec
from megatron_opd.weights.files import SafetensorsFolder, write_folder
from megatron_opd.weights.mapping import hf_manifest
from tests.model import tiny

MANIFEST = tuple(TensorSpec(name=f"t{n}", dtype="bfloat16", shape=(n + 1, 4)) for n in range(5))


def _tensors():
    return [(spec.name, torch.randn(spec.shape).to(torch.bfloat16)) for spec in MANIFEST]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "optimizer.pt").write_text("not wanted")
    return folder


@pytest.mark.parametrize("shard_bytes", [1, 60, 1 << 20])
def test_what_is_written_in_any_number_of_files_is_read_back(shard_bytes, source, tmp_path):
    tensors = _tensors()
    write_folder(tmp_path / "out", MANIFEST, iter(tensors), source=source, shard_bytes=shard_bytes)
    with SafetensorsFolder(tmp_path / "out") as files:
        files.check(MANIFEST)
        assert all(torch.equal(files.get(name), tensor) for name, tensor in tensors)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.json", "chat_template.jinja"} < written
    assert "optimizer.pt" not in written
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "qwen3", "dtype": "bfloat16"}
    weights = [path for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(weights) == {1: 5, 60: 3, 1 << 20: 1}[shard_bytes]


def test_transformers_loads_what_is_written(tmp_path):
    folder = tiny.write_model(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    manifest = hf_manifest(tiny.read_config(folder), "float32")
    with SafetensorsFolder(folder) as files:
        write_folder(
            tmp_path / "copy", manifest, ((spec.name, files.get(spec.name)) for spec in manifest), source=folder, shard_bytes=50_000
        )
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(tiny.read_model(str(tmp_path / "copy"))(ids).logits, tiny.read_model(folder)(ids).logits)


def test_a_buffer_that_is_filled_again_while_a_shard_is_collected_does_no_harm(source, tmp_path):
    buffer = torch.empty(5, 4, dtype=torch.bfloat16)
    stream = ((spec.name, buffer[: spec.shape[0]].fill_(n)) for n, spec in enumerate(MANIFEST))
    write_folder(tmp_path / "out", MANIFEST, stream, source=source)
    with SafetensorsFolder(tmp_path / "out") as files:
        assert [files.get(spec.name).unique().tolist() for spec in MANIFEST] == [[0], [1], [2], [3], [4]]


def test_a_failed_write_leaves_no_folder_and_can_be_repeated(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected tensor \('t4'.*got .'the end'"):
        write_folder(tmp_path / "out", MANIFEST, iter(_tensors()[:-1]), source=source)
    assert not (tmp_path / "out").exists()
    write_folder(tmp_path / "out", MANIFEST, iter(_tensors()), source=source)
    with pytest.raises(CheckpointError, match="exists already"):
        write_folder(tmp_path / "out", MANIFEST, iter(_tensors()), source=source)


def test_tensors_out_of_order_or_beyond_the_manifest_are_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="expected tensor"):
        write_folder(tmp_path / "out", MANIFEST, reversed(_tensors()), source=source)
    with pytest.raises(CheckpointError, match="more follows"):
        write_folder(tmp_path / "out", MANIFEST, iter([*_tensors(), ("more", torch.zeros(1))]), source=source)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    a, b = (TensorSpec(name=name, dtype="float32", shape=(size,)) for name, size in (("a", 2), ("b", 3)))
    with SafetensorsFolder(tmp_path) as files:
        files.check([a, b])
        with pytest.raises(CheckpointError, match="lacks c"):
            files.check([a, b, TensorSpec(name="c", dtype="float32", shape=(1,))])
        with pytest.raises(CheckpointError, match=r"model\.safetensors holds b"):
            files.check([a])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: b has shape \[3\], wanted \[4\]"):
            files.check([a, TensorSpec(name="b", dtype="float32", shape=(4,))])
        with pytest.raises(CheckpointError, match="does not hold c"):
            files.get("c")


def test_repetitions_of_the_config_are_passed_over(tmp_path):
    save_file(
        {"a": torch.zeros(2), "lm_head.weight": torch.zeros(1), "x.rotary_emb.inv_freq": torch.zeros(1)}, tmp_path / "model.safetensors"
    )
    with SafetensorsFolder(tmp_path) as files:
        files.check([TensorSpec(name="a", dtype="float32", shape=(2,))])


def test_a_truncated_file_is_named(source, tmp_path):
    write_folder(tmp_path / "out", MANIFEST, iter(_tensors()), source=source, shard_bytes=60)
    victim = tmp_path / "out" / "model-00002-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is truncated"):
        SafetensorsFolder(tmp_path / "out")
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors does not exist"):
        SafetensorsFolder(tmp_path / "out")


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"')
    with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors index"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"places a in model\.safetensors, which does not hold it"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        SafetensorsFolder(tmp_path)
