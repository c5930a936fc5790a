"""Which files of a folder are documents of a corpus, and why the others are not."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rpt_jax.corpus.compression import COMPRESSED_ENDINGS
from rpt_jax.errors import UserError
from rpt_jax.infra.storage import INDEX_FILES

TEXT_FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv")  # Those that may be compressed.
FORMATS = (*TEXT_FORMATS, ".parquet", ".arrow", ".array_record")
_SYNONYMS = {".ndjson": ".jsonl"}

# Why a file of a folder is not read.
EVALUATION_SPLIT = "of an evaluation split (read if the path names it)"
DANGLING_LINK = "broken links"
_HIDDEN = "hidden"
_DATASETS_FILE = "of the `datasets` library, without documents"

# Files and folders of a split: test, test.jsonl, test-00000-of-00001.parquet, c4-validation.00000-of-00008.json.gz.
_SPLIT = re.compile(
    r"(?:(?P<prefix>.*)[-_.])?(?P<split>train|test|validation|valid|val|dev|eval)(?:[-.]\d{5}-of-\d{5}.*|(?:\.[a-z]\w*)*)",
    re.IGNORECASE,
)
_SPLIT_WORD = re.compile(r"(?<![a-z])(?:test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_DATASET_DICT = "dataset_dict.json"
_STATE = "state.json"
_DATASETS_FILES = (_STATE, _DATASET_DICT, "dataset_info.json", "dataset_infos.json")


def file_format(path: Path) -> str:
    """Return the ending that names the format, such as ".jsonl" for "a.JSONL.gz" and "a.ndjson"; "" if there is none."""
    suffixes = [_SYNONYMS.get(suffix.lower(), suffix.lower()) for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_ENDINGS:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in TEXT_FORMATS else ""
    return suffixes[-1] if suffixes else ""


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its ending."""
    return path.suffix.lower() in COMPRESSED_ENDINGS


def why_not_read(path: Path, field: str) -> str:
    """Return why a file is not read in any folder; "" if it is read. Raises: UserError, about the config field."""
    if not path.exists():
        return DANGLING_LINK
    if not path.is_file():
        return "neither files nor folders"
    if path.name in _DATASETS_FILES or _is_dataset_cache(path, field):
        return _DATASETS_FILE
    if file_format(path) in FORMATS:
        return "" if path.stat().st_size else "empty files"
    return f"{''.join(path.suffixes[-1:])} files" if path.suffix else "files without an ending"


def _walk(root: Path, field: str) -> Iterator[tuple[Path, str]]:
    """Yield everything below a folder and why it is not read, "" if it is. Hidden folders are yielded as a whole.

    Links are followed; a folder that several links lead to is read once.

    Raises: UserError, if a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{field}: cannot list the folder {error.filename}: {error.strerror}. Make it readable or leave it out.",
            field=field,
        )

    visited = set()
    evaluation_folders = set()
    for name, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        folder = Path(name)
        identity = folder.stat()
        if (identity.st_dev, identity.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((identity.st_dev, identity.st_ino))

        # Hidden folders are not entered.
        yield from ((folder / subfolder, _HIDDEN) for subfolder in subfolders if _is_hidden(subfolder))
        subfolders[:] = sorted(subfolder for subfolder in subfolders if not _is_hidden(subfolder))

        evaluation_names = _evaluation_splits(subfolders, files)
        is_evaluation = folder in evaluation_folders
        evaluation_folders.update(folder / name for name in subfolders if is_evaluation or name in evaluation_names)
        for file in (file for file in files if file not in INDEX_FILES):
            reason = _HIDDEN if _is_hidden(file) else why_not_read(folder / file, field)
            if not reason and (is_evaluation or file in evaluation_names):
                reason = EVALUATION_SPLIT
            yield folder / file, reason


def walk_matches(pattern: str, field: str) -> Iterator[tuple[Path, str]]:
    """Yield what a file, folder or glob stands for and why it is not read, "" if it is.

    A glob leaves out the hidden folders and the evaluation splits that it matches, unless its own text names one.

    Raises: UserError, about the config field, if a folder cannot be read.
    """
    is_glob = not os.path.exists(pattern)
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    names_split = bool(_SPLIT_WORD.search(pattern.removeprefix(str(root))))
    splits_of: dict[Path, set[str]] = {}

    def is_of_evaluation_split(path: Path) -> bool:
        for entry in itertools.takewhile(lambda entry: entry != root, (path, *path.parents)):
            folder = entry.parent
            if folder not in splits_of:
                is_folder = {item.name: item.is_dir() for item in folder.iterdir()}
                subfolders = [name for name in is_folder if is_folder[name] and not _is_hidden(name)]
                splits_of[folder] = _evaluation_splits(subfolders, [name for name in is_folder if not is_folder[name]])
            if entry.name in splits_of[folder]:
                return True
        return False

    def hidden_part(path: Path) -> Path | None:
        """Return the outermost hidden file or folder on the way from the root to `path`."""
        entries = itertools.takewhile(lambda entry: entry != root, (path, *path.parents))
        hidden = [entry for entry in entries if _is_hidden(entry.name) and entry.name not in Path(pattern).parts]
        return hidden[-1] if hidden else None

    for match in map(Path, sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]):
        if is_glob and (hidden := hidden_part(match)):
            yield hidden, _HIDDEN
            continue
        is_left_out = is_glob and not names_split and is_of_evaluation_split(match)
        for path, reason in _walk(match, field) if match.is_dir() else [(match, why_not_read(match, field))]:
            yield path, EVALUATION_SPLIT if is_left_out and not reason else reason


def _evaluation_splits(subfolders: Sequence[str], files: Sequence[str]) -> set[str]:
    """Return the files and subfolders that are evaluation splits next to a training split of the same name."""
    splits = {name: match for name in (*subfolders, *files) if (match := _SPLIT.fullmatch(name))}
    prefixes = {match["prefix"] for match in splits.values() if match["split"].lower() == "train"}
    # The folder of a DatasetDict has a subfolder for each split; the training splits can have any name.
    if _DATASET_DICT in files and not splits.keys() >= set(subfolders):
        prefixes.add(None)
    return {name for name, match in splits.items() if match["split"].lower() != "train" and match["prefix"] in prefixes}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_dataset_cache(path: Path, field: str) -> bool:
    """Return whether an .arrow file is a cache in a folder that the `datasets` library saved, not one of its data files.

    Raises: UserError, about the config field.
    """
    state = path.with_name(_STATE)
    if file_format(path) != ".arrow" or not state.is_file():
        return False
    try:
        return path.name not in {file["filename"] for file in json.loads(state.read_bytes())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise read_error(state, 1, error, field) from error


def read_error(path: Path, line: int, error: Exception, field: str) -> UserError:
    """Return the `UserError` for a file, given by the config field `field`, that cannot be read beyond `line`."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{field}: cannot read {path}:{line}: {reason[:300]}. Repair the file or leave it out.",
        field=field,
    )
