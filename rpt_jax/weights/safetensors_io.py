"""Named tensors on disk: read one at a time, written one at a time, checked on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rpt_jax.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Spec(NamedTuple):
    dtype: np.dtype
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * int(np.prod(self.dims))


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors by name, none of which is in memory. `source` says in messages where they are."""

    source: str
    specs: dict[str, Spec]
    fetch: Callable[[str], np.ndarray] = dataclasses.field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor. Raises: UserError, where it holds NaN or infinity."""
        tensor = self.fetch(name)
        # Of the smallest and the largest value, because a mask of the whole tensor would be another one in memory.
        with np.errstate(invalid="ignore"):
            extremes = [float(tensor.min()), float(tensor.max())]
        if not np.isfinite(extremes).all():
            raise UserError(f"{self.source}: {name} holds NaN or infinity.")
        return tensor

    def check(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> Tensors:
        """Return just the expected tensors, in that order. Raises: UserError, for one missing, too many or misshapen."""
        specs = {}
        for name, dims in expected:
            spec = self.specs.get(name)
            if spec is None:
                raise UserError(f"{self.source} lacks the tensor {name}.")
            if spec.dims != dims:
                raise UserError(f"{self.source}: {name} has shape {spec.dims}, expected {dims} by config.json.")
            specs[name] = spec
        # Frequencies, which old exports hold, follow from the shape.
        surplus = [name for name in self.specs if name not in specs and not name.endswith("rotary_emb.inv_freq")]
        if surplus:
            raise UserError(
                f"{self.source} holds tensors that this policy has no place for: {', '.join(sorted(surplus)[:5])}."
            )
        return dataclasses.replace(self, specs=specs)

    def without(self, name: str) -> Tensors:
        return dataclasses.replace(self, specs={n: spec for n, spec in self.specs.items() if n != name})


def open_safetensors(directory: Path) -> Tensors:
    """Open model.safetensors, or the shards that its index names. Raises: UserError, naming the file that is at fault."""
    index, source = directory / INDEX, directory / WEIGHTS
    if index.is_file() and not source.is_file():
        source, places = index, _read_index(index)
        files = sorted(set(places.values()))
    else:
        files, places = [WEIGHTS], None
    specs, opened = {}, {}
    for file in files:
        path = directory / file
        try:
            opened[file] = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        for name in opened[file].keys():  # noqa: SIM118 (not a dict)
            part = opened[file].get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise UserError(f"{path}: {name} is {part.get_dtype()}, which is not one of: {', '.join(_DTYPES)}.")
            specs[name] = Spec(_DTYPES[part.get_dtype()], tuple(part.get_shape()))
            if places is not None and places.get(name) != file:
                raise UserError(f"{index} does not say that {name} is in {file}; copy both again.")
    places = dict.fromkeys(specs, WEIGHTS) if places is None else places
    if lost := sorted(places.keys() - specs.keys()):
        raise UserError(f"{directory / places[lost[0]]} lacks the tensor {lost[0]}, which {index} says it has.")

    def fetch(name: str) -> np.ndarray:
        try:
            return opened[places[name]].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(directory / places[name], error) from None

    return Tensors(str(source), specs, fetch)


def _read_index(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
            raise ValueError("weight_map must name files beside it")
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as an index of safetensors ({error}); copy it again.") from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as safetensors ({error}); write or copy the weights again.")


def write_safetensors(directory: Path, tensors: Tensors) -> None:
    """Write model.safetensors, or shards of up to 5 GB and their index, holding one tensor at a time."""
    shards = list(_shards(tensors.specs))
    if len(shards) == 1:
        _write_file(directory / WEIGHTS, tensors, shards[0])
        return
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, tensors, names)
        places |= dict.fromkeys(names, file)
    total = sum(spec.size for spec in tensors.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shards(specs: dict[str, Spec]) -> Iterator[list[str]]:
    names, size = [], 0
    for name, spec in specs.items():
        if names and size + spec.size > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.size
    yield names


def _write_file(path: Path, tensors: Tensors, names: list[str]) -> None:
    # The library's own writer wants all tensors of a file in memory. The format: the header's length in eight bytes,
    # the header in JSON filled up with spaces to a multiple of eight, and the tensors' bytes.
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        spec = tensors.specs[name]
        header[name] = {"dtype": _CODES[spec.dtype], "shape": spec.dims, "data_offsets": [end, end + spec.size]}
        end += spec.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            spec, tensor = tensors.specs[name], tensors.read(name)
            assert (tensor.dtype, tensor.shape) == spec, (name, tensor.dtype, tensor.shape, spec)
            # Through integers, because bfloat16 has no buffer of its own.
            file.write(np.ascontiguousarray(tensor).view(f"u{spec.dtype.itemsize}").data)
