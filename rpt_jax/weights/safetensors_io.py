"""Named tensors on disk in safetensors format, read and written one at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rpt_jax.errors import UserError
from rpt_jax.weights.model_files import INDEX_FILE, WEIGHTS_FILE, unreadable_hint

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor that is not loaded."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """Tensors by name that are loaded on demand.

    Attributes:
      source: file, or other description of where the tensors come from, for error messages.
      specs: dtype and shape of each tensor by name.
      fetch: function from a name to the tensor.
    """

    source: str
    specs: dict[str, TensorSpec]
    fetch: Callable[[str], np.ndarray] = dataclasses.field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """Load one tensor. Raises: UserError if it contains NaN or infinity."""
        tensor = self.fetch(name)
        # Check the extremes, because np.isfinite of the whole tensor would allocate a second array.
        with np.errstate(invalid="ignore"):
            extremes = [float(tensor.min()), float(tensor.max())]
        if not np.isfinite(extremes).all():
            raise UserError(f"{self.source}: tensor {name} contains NaN or infinity.", field=self.source)
        return tensor

    def select(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> Tensors:
        """Return the expected tensors, in the given order.

        Args:
          expected: name and shape of each tensor.

        Raises: UserError if a tensor is missing, has another shape or is not expected.
        """
        specs = {}
        for name, shape in expected:
            spec = self.specs.get(name)
            if spec is None:
                raise UserError(f"{self.source}: tensor {name} is missing.", field=self.source)
            if spec.shape != shape:
                raise UserError(
                    f"{self.source}: tensor {name} has shape {spec.shape}, expected {shape} according to config.json.",
                    field=self.source,
                )
            specs[name] = spec
        # Old exports contain the rotary frequencies, which follow from the config.
        unknown = [name for name in self.specs if name not in specs and not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise UserError(
                f"{self.source}: unknown tensors {', '.join(sorted(unknown)[:5])}; this architecture does not have them.",
                field=self.source,
            )
        return dataclasses.replace(self, specs=specs)

    def without(self, name: str) -> Tensors:
        """Return all tensors except one."""
        return dataclasses.replace(self, specs={n: spec for n, spec in self.specs.items() if n != name})


def open_safetensors(directory: Path) -> Tensors:
    """Open model.safetensors, or the shards listed in its index.

    Raises: UserError that names the file, if it is missing, damaged or contradicts the index.
    """
    # Find the files: a single one, or those of the index.
    index_path = directory / INDEX_FILE
    source = directory / WEIGHTS_FILE
    index: dict[str, str] | None = None
    files = [WEIGHTS_FILE]
    if index_path.is_file() and not source.is_file():
        source = index_path
        index = _read_index(index_path)
        files = sorted(set(index.values()))

    # Read the header of each, which has the dtypes and shapes, and compare it with the index.
    specs: dict[str, TensorSpec] = {}
    opened: dict[str, Any] = {}
    file_of: dict[str, str] = {}
    for file in files:
        path = directory / file
        try:
            opened[file] = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        for name in opened[file].keys():  # noqa: SIM118 (not a dict)
            tensor = opened[file].get_slice(name)
            dtype = tensor.get_dtype()
            if dtype not in _DTYPES:
                raise UserError(
                    f"{path}: tensor {name} has dtype {dtype}, which is not one of: {', '.join(_DTYPES)}.",
                    field=str(path),
                )
            specs[name] = TensorSpec(dtype=_DTYPES[dtype], shape=tuple(tensor.get_shape()))
            file_of[name] = file
            if index is not None and index.get(name) != file:
                raise UserError(
                    f"{index_path} does not list tensor {name} of {file}. Copy the index and the shards again.",
                    field=str(index_path),
                )
    if index is not None and (missing := sorted(index.keys() - specs.keys())):
        path = directory / index[missing[0]]
        raise UserError(f"{path}: tensor {missing[0]}, listed in {index_path}, is missing.", field=str(path))

    def fetch(name: str) -> np.ndarray:
        try:
            return opened[file_of[name]].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(directory / file_of[name], error) from None

    return Tensors(source=str(source), specs=specs, fetch=fetch)


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor; the files must be in the directory of the index."""
    try:
        file_of = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in file_of.values()):
            raise ValueError("weight_map must contain names of files in the same directory")
        return file_of
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = unreadable_hint(path) or " Copy it again."
        raise UserError(f"{path} is not a valid safetensors index ({error}).{hint}", field=str(path)) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    hint = unreadable_hint(path) or " Write or copy the weights again."
    return UserError(f"{path} cannot be read as safetensors ({error}).{hint}", field=str(path))


def write_safetensors(directory: Path, tensors: Tensors, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write model.safetensors, or shards and their index, loading one tensor at a time.

    Args:
      directory: existing directory to write to.
      tensors: what is written.
      max_shard_bytes: a shard is larger than this only if it has a single tensor.
    """
    shards = list(_split_shards(tensors.specs, max_shard_bytes))
    if len(shards) == 1:
        _write_file(directory / WEIGHTS_FILE, tensors, shards[0])
        return
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, tensors, names)
        file_of |= dict.fromkeys(names, file)
    total = sum(spec.nbytes for spec in tensors.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")


def _split_shards(specs: dict[str, TensorSpec], max_shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the tensors of each shard."""
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.nbytes > max_shard_bytes:
            yield names
            names = []
            size = 0
        names.append(name)
        size += spec.nbytes
    yield names


def _write_file(path: Path, tensors: Tensors, names: list[str]) -> None:
    """Write one safetensors file.

    The library's own writer needs all tensors of a file in memory. Format: the length of the header in eight bytes, the header
    in JSON, padded with spaces to a multiple of eight bytes, and the bytes of the tensors.
    """
    # Build the header from the specs, before any tensor is loaded.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = tensors.specs[name]
        header[name] = {
            "dtype": _DTYPE_CODES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    # Write the tensors one at a time.
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            spec = tensors.specs[name]
            tensor = tensors.read(name)
            assert (tensor.dtype, tensor.shape) == spec, (name, tensor.dtype, tensor.shape, spec)
            # View as integers, because bfloat16 does not support the buffer protocol.
            file.write(np.ascontiguousarray(tensor).view(f"u{spec.dtype.itemsize}").data)
