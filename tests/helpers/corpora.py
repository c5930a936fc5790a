"""Small corpora on disk, and the config of a run that scores one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter

from rpt_jax.config import DataConfig, Experiment, from_config_dict
from tests.helpers.paths import TINY

Record = dict[str, Any]


def json_lines(records: Iterable[Record]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def write_jsonl(path: Path, texts: Iterable[str]) -> DataConfig:
    """Write one document per line, and return the config that reads the file."""
    path.write_bytes(json_lines({"text": text} for text in texts))
    return DataConfig(source="path", path=str(path))


def write_array_record(path: Path, records: Iterable[Record]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


def write_every_format(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Write the same records in every format with records; return the files, and a folder as `datasets` saves it."""
    columns = pyarrow.table({name: [record[name] for record in records] for name in records[0]})
    (folder / "a.jsonl").write_bytes(json_lines(records))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(records)))
    # Two frames of zstd, and an ending in capital letters.
    (folder / "c.JSONL.ZST").write_bytes(zstd(json_lines(records[:1])) + zstd(json_lines(records[1:])))
    pyarrow.parquet.write_table(columns, folder / "d.parquet", row_group_size=2)
    saved = folder / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", columns.schema) as stream:
        stream.write_table(columns, max_chunksize=2)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (saved / "cache-0123.arrow").write_bytes(b"the cache of a transformation, not data")
    with pyarrow.ipc.new_file(folder / "f.arrow", columns.schema) as file:
        file.write_table(columns)
    write_array_record(folder / "g.array_record", records)
    return [*(path for path in sorted(folder.iterdir()) if path != saved), saved]


def write_number_corpus(folder: Path, count: int = 60) -> DataConfig:
    """Write `count` documents of random numbers to three files, each of which also has a repeated and an empty document."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        texts = [
            f"{name} {i}: " + " ".join(map(str, rng.integers(0, 99, rng.integers(1, 90)))) for i in range(count // 3)
        ]
        write_jsonl(folder / name, [*texts, "repeated", ""])
    return DataConfig(source="path", path=str(folder), max_document_tokens=64, held_out_documents=7)


def scoring_experiment(path: Path, **fields: object) -> Experiment:
    """Return the config of task "score" for the files at `path`, with the small policy; `fields` are those of `data`."""
    data = {"source": "path", "path": str(path), "max_document_tokens": 64, "held_out_documents": 7}
    return from_config_dict(
        {
            "task": "score",
            "policy": {"path": str(TINY)},
            "data": data | {"score_batch_windows": 8} | fields,
            "training": {"prompts_per_step": 8, "logit_chunk_tokens": 1024},
        }
    )
