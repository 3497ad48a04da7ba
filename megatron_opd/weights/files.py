"""Hugging Face model folders: safetensors read lazily by name, written whole or not at all. It knows no architecture."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_opd.errors import CheckpointError
from megatron_opd.types import TensorSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What a folder holds beside config.json and weights: tokenizers of all kinds, chat templates, sampling defaults.
_COMPANIONS = (
    "tokenizer*",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class SafetensorsFolder:
    """The tensors of a model folder by name; nothing is read before it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Opens the headers.

        Raises:
            CheckpointError: no weights, a file that the index names is missing, or one is truncated.
        """
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._place = self._read_index() if (self.folder / _INDEX).is_file() else self._read_single()

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files."""
        self._files.clear()

    @property
    def names(self) -> frozenset[str]:
        """All tensors in the folder."""
        return frozenset(self._place)

    def get(self, name: str) -> Tensor:
        """The tensor, read now.

        Raises:
            CheckpointError: the folder does not hold it.
        """
        if name not in self._place:
            raise CheckpointError(f"{self.folder} does not hold {name}")
        return self._files[self._place[name]].get_tensor(name)

    def check(self, manifest: Sequence[TensorSpec]) -> None:
        """Compares names and shapes with what a model needs; dtypes may differ.

        A head stored beside tied embeddings and rotary frequencies repeat what the config says and are passed over.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape; names it and its file.
        """
        wanted = {spec.name: spec for spec in manifest}
        missing = [name for name in wanted if name not in self._place]
        if missing:
            raise CheckpointError(f"{self.folder} lacks {_some(missing)}; the folder is incomplete or config.json describes another model")
        extra = [name for name in sorted(self._place) if name not in wanted and not _repeats(name)]
        if extra:
            raise CheckpointError(
                f"{self.folder / self._place[extra[0]]} holds {_some(extra)}, unknown to the model that config.json describes"
            )
        for name, spec in wanted.items():
            shape = tuple(self._files[self._place[name]].get_slice(name).get_shape())
            if shape != spec.shape:
                raise CheckpointError(f"{self.folder / self._place[name]}: {name} has shape {list(shape)}, wanted {list(spec.shape)}")

    def _read_single(self) -> dict[str, str]:
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            place = dict(json.loads(path.read_text())["weight_map"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a safetensors index: {error}") from error
        held = {file: frozenset(self._open(file).keys()) for file in sorted(set(place.values()))}
        for name, file in place.items():
            if name not in held[file]:
                raise CheckpointError(f"{path} places {name} in {file}, which does not hold it")
        return place

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; a model folder needs {_SINGLE}, or {_INDEX} with all files that it names")
        try:
            self._files[file] = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
        return self._files[file]


def _repeats(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_folder(
    folder: str | Path,
    manifest: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    shard_bytes: int = 5 << 30,
) -> None:
    """Writes `tensors`, which come in the manifest's order, with config and tokenizer of `source`; one shard is in memory at a time.

    The folder appears under its name only when it is complete.

    Raises:
        CheckpointError: the folder exists, or the tensors are not those of the manifest.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; name a new folder")
    shards = _plan(manifest, shard_bytes)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stream = iter(tensors)
    for file, specs in shards.items():
        save_file({spec.name: _next(stream, spec) for spec in specs}, partial / file, metadata={"format": "pt"})
    surplus = next(stream, None)
    if surplus is not None:
        raise CheckpointError(f"{surplus[0]} follows the last tensor of the manifest")
    if len(shards) > 1:
        _write_index(partial / _INDEX, shards)
    _copy_companions(Path(source), partial, dtype=manifest[0].dtype)
    os.rename(partial, folder)


def _plan(manifest: Sequence[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, each file at most `shard_bytes` unless one tensor alone is larger."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in manifest:
        if not shards or _bytes(spec) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= _bytes(spec)
    if len(shards) == 1:
        return {_SINGLE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": specs for number, specs in enumerate(shards, 1)}


def _bytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * getattr(torch, spec.dtype).itemsize


def _next(stream: Iterator[tuple[str, Tensor]], spec: TensorSpec) -> Tensor:
    name, tensor = next(stream, ("the end", torch.empty(0)))
    got = (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if got != (spec.name, spec.dtype, spec.shape):
        raise CheckpointError(f"expected tensor {(spec.name, spec.dtype, spec.shape)}, got {got}")
    # A copy, because a view may belong to a buffer that the sender fills again before the shard is written.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_index(path: Path, shards: dict[str, list[TensorSpec]]) -> None:
    total = sum(_bytes(spec) for specs in shards.values() for spec in specs)
    places = {spec.name: file for file, specs in shards.items() for spec in specs}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))


def _copy_companions(source: Path, target: Path, *, dtype: str) -> None:
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)
