"""Corpora: plain text documents, and which of them training never sees.

Three sources: problems with worked solutions that are generated here (`gsm_symbolic`), competition problems
with stepwise solutions (`champ`), and a user's own text (`path`). Every split is a function of `data.seed` and of
what a document says, so it does not move when files or lines change places. Text is never normalised: the bytes
that are predicted later are the bytes of the file.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from rpt_jax.config import DataConfig
from rpt_jax.errors import UserError, nearest

HELD_OUT_SHARE = 0.2
PIECE_CHARACTERS = 2000

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_FLOAT_NOISE = re.compile(r"\d\.\d{7}")  # 14.500000000000002: an artefact of the generator that nobody could predict.
# The groups are atomic because a backtracking `\r\n` would pass for two line ends.
_LINE_END = re.compile(r"(?>\r\n|\r|\n)")
_SPACES = re.compile(r"[ \t]+")
_BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)(?:[ \t]*(?>\r\n|\r|\n))+")


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    name: str  # Unique in its corpus, and enough to find the text again: "gsm_symbolic:17:4", "notes.jsonl:7".
    template: str = ""  # What it was generated from, where it was.


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by what they are for; no text occurs twice.

    `held_out_templates` holds documents of templates that neither `train` nor `held_out` contains, and is empty
    where the source has no templates. `skipped` counts, by reason, what was found or generated and left out.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    held_out_templates: tuple[Document, ...]
    skipped: dict[str, int]


def load_corpus(config: DataConfig) -> Corpus:
    """Read or generate the corpus that `config` describes; the same config always gives the same corpus.

    Raises `UserError` for a source that is not known or not installed, for unreadable files and lines, and for a corpus
    too small to hold anything out.
    """
    sources = {"gsm_symbolic": _load_gsm_symbolic, "champ": _load_champ, "path": _load_path}
    return sources[config.source](config)


def source_name(config: DataConfig) -> str:
    """What to call the corpus in a message."""
    return f"data.path='{config.path}'" if config.source == "path" else f"data.source='{config.source}'"


def check_source(config: DataConfig) -> None:
    """Raises: UserError, where the source is not here at all; what it says is not read."""
    checks = {"gsm_symbolic": _gsm_generators, "champ": _champ_file, "path": lambda: _text_files(config.path)}
    checks[config.source]()


def _hash(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:8], "big")


def _split(candidates: Sequence[tuple[Document, str]], config: DataConfig) -> Corpus:
    """Hold out the documents with the lowest hashes: a fifth, at most `data.held_out_documents`.

    Each candidate comes with the key that its side depends on. Empty documents (nothing but whitespace) and
    repetitions are skipped. Ranks, unlike a threshold, leave no document unused and no side empty.
    """
    kept: dict[str, tuple[Document, int]] = {}
    skipped: collections.Counter = collections.Counter()
    for document, key in candidates:
        if not document.text.strip():
            skipped["empty"] += 1
        elif document.text in kept:
            skipped["duplicate"] += 1
        else:
            kept[document.text] = (document, _hash(config.seed, key))
    if len(kept) < 2:
        raise UserError(
            f"data.path='{config.path}' is too short: it gives {len(kept)} distinct non-empty document(s), and at "
            "least 2 are needed, one to train on and one to hold out. Add text: a .txt is cut into documents of about "
            f"{PIECE_CHARACTERS} characters, a .jsonl has one document per line."
        )
    count = min(config.held_out_documents, max(1, int(len(kept) * HELD_OUT_SHARE)))
    held_out = set(sorted(kept, key=lambda text: (kept[text][1], text))[:count])
    return Corpus(
        train=tuple(document for document, _ in kept.values() if document.text not in held_out),
        held_out=tuple(document for document, _ in kept.values() if document.text in held_out),
        held_out_templates=(),
        skipped=dict(skipped),
    )


# --- gsm_symbolic ---------------------------------------------------------------------------------


def _load_gsm_symbolic(config: DataConfig) -> Corpus:
    """Generate problems with worked solutions, holding out combinations of numbers and whole templates.

    The sorted numbers of a problem decide by hash whether it may be trained on, whatever its template: no
    combination of numbers in `held_out` ever occurs in `train`. There are a third as many documents of unseen
    templates as of unseen numbers.
    """
    generators = _gsm_generators()
    templates = Random(f"{config.seed}:templates").sample(sorted(generators), len(generators))
    if config.held_out_templates >= len(templates):
        raise UserError(
            f"data.held_out_templates={config.held_out_templates} leaves none to train on: gsm_symbolic has "
            f"{len(templates)} templates. Choose at most {len(templates) - 1}."
        )
    unseen, seen = templates[: config.held_out_templates], templates[config.held_out_templates :]
    skipped: collections.Counter = collections.Counter()
    quotas = {"train": config.documents, "held_out": config.held_out_documents}

    def side(problem: str) -> str:
        numbers = sorted(number.replace(",", "") for number in _NUMBER.findall(problem))
        return "held_out" if _hash(config.seed, " ".join(numbers)) < HELD_OUT_SHARE * 2**64 else "train"

    drawn = _draw({t: generators[t] for t in seen}, config.seed, quotas, side, skipped)
    unseen_quota = {"held_out_templates": config.held_out_documents // 3 if unseen else 0}
    drawn |= _draw(
        {t: generators[t] for t in unseen}, config.seed, unseen_quota, lambda problem: "held_out_templates", skipped
    )
    return Corpus(**{name: tuple(documents) for name, documents in drawn.items()}, skipped=dict(skipped))


def _gsm_generators() -> dict[int, Callable[[Random, float], dict[str, Any]]]:
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic
    except ImportError as error:
        raise UserError(
            "data.source='gsm_symbolic' needs the package reasoning-gym: pip install reasoning-gym==0.1.25"
        ) from error
    dataset = gsm_symbolic.GSMSymbolicDataset(gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1))
    # The package lists by number the templates that it has checked. Going to their generators instead of through the
    # dataset tells the template of an item, and leaves out the boilerplate that the dataset appends to every question.
    return {number: dataset.generators[number] for number in gsm_symbolic.tasks_ok}


def _draw(
    generators: dict[int, Callable[[Random, float], dict[str, Any]]],
    seed: int,
    quotas: dict[str, int],
    side: Callable[[str], str],
    skipped: collections.Counter,
) -> dict[str, list[Document]]:
    """Draw from the templates in turn until every side has its quota; what a full side is offered is dropped."""
    drawn: dict[str, list[Document]] = {name: [] for name in quotas}
    texts: set[str] = set()
    templates = list(generators)
    # Some templates have few different items. Without a limit a quota beyond them would never be reached.
    limit = 1000 + 20 * sum(quotas.values())
    for attempt in itertools.count():
        if all(len(drawn[name]) >= quota for name, quota in quotas.items()):
            return drawn
        if attempt == limit:
            break
        draw, index = divmod(attempt, len(templates))
        template = templates[index]
        try:
            item = generators[template](Random(f"{seed}:{template}:{draw}"), 1.0)
        except (ValueError, ArithmeticError, LookupError) as error:  # The template has no valid numbers here.
            skipped[f"generator raised {type(error).__name__}"] += 1
            continue
        problem = item["question"]
        text = f"{problem}\n{item['metadata']['answer_cot']}"
        if _FLOAT_NOISE.search(text):
            skipped["floating-point noise"] += 1
        elif text in texts:
            skipped["duplicate"] += 1
        elif len(drawn[name := side(problem)]) < quotas[name]:
            texts.add(text)
            drawn[name].append(Document(text, f"gsm_symbolic:{template}:{draw}", str(template)))
    found = ", ".join(f"{len(drawn[name])} of {quota} for {name}" for name, quota in quotas.items())
    raise UserError(
        f"gsm_symbolic gave too few different documents in {limit} draws: {found}. "
        "Lower data.documents or data.held_out_documents."
    )


# --- champ ----------------------------------------------------------------------------------------


def _champ_file() -> Path:
    spec = importlib.util.find_spec("champ_dataset")
    if spec is None:
        raise UserError("data.source='champ' needs the package champ-dataset: pip install champ-dataset==1.0.0")
    return Path(spec.origin).parent / "dataset_files" / "v0.json"


def _load_champ(config: DataConfig) -> Corpus:
    problems = json.loads(_champ_file().read_bytes())["problems"]
    candidates = []
    for name, problem in problems.items():
        lines = [problem["_text"], *(step["_text"] for step in problem["solution"]["steps"])]
        candidates.append((Document("\n".join(lines), f"champ:{name}"), problem["_text"]))
    return _split(candidates, config)


# --- path -----------------------------------------------------------------------------------------


def _text_files(path: str) -> list[Path]:
    if not path:
        raise UserError("data.path is empty: data.source='path' needs a .txt, a .jsonl or a folder of them.")
    root = Path(path)
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _READERS and path.is_file())
        if not paths:
            raise UserError(f"data.path='{root}' is a folder without any .txt or .jsonl file in it.")
        return paths
    if not root.exists():
        raise UserError(f"data.path='{root}' does not exist. Give a .txt, a .jsonl or a folder of them.")
    if root.suffix.lower() not in _READERS:
        raise UserError(f"data.path='{root}' is neither a .txt nor a .jsonl file nor a folder of them.")
    return [root]


def _load_path(config: DataConfig) -> Corpus:
    root, candidates = Path(config.path), []
    for path in _text_files(config.path):
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"data.path: cannot read {path}: {error.strerror}.") from error
        for place, text in _READERS[path.suffix.lower()](data, path, config.text_field):
            candidates.append((Document(text, f"{name}:{place}"), text))
    return _split(candidates, config)


def split_text(text: str) -> list[str]:
    """Cut a text at blank lines into pieces of at most about 2,000 characters; joined, they are the text again.

    A paragraph longer than that is cut at its line ends, a line longer than that at its spaces, and a word stays whole.
    """
    pieces, current = [], ""
    for part in _parts(text, (_BLANK_LINES, _LINE_END, _SPACES)):
        if current and len(current) + len(part) > PIECE_CHARACTERS:
            pieces.append(current)
            current = ""
        current += part
    return [*pieces, current] if current else pieces


def _parts(text: str, separators: Sequence[re.Pattern]) -> Iterator[str]:
    """Cut at the first separator, and what is too long then at the next."""
    for part in _cut_after(text, separators[0]):
        if len(part) > PIECE_CHARACTERS and separators[1:]:
            yield from _parts(part, separators[1:])
        else:
            yield part


def _cut_after(text: str, separator: re.Pattern) -> Iterator[str]:
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} of the file "
            f"({error.reason}). Convert the file to UTF-8."
        ) from error


def _read_txt(data: bytes, path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield of every piece where it begins, `line` or `line:column`, and its text."""
    del text_field
    line, column = 1, 1
    for piece in split_text(_decode(data, str(path), 0).removeprefix("\ufeff")):
        yield f"{line}" if column == 1 else f"{line}:{column}", piece
        *ended, rest = _LINE_END.split(piece)
        line, column = line + len(ended), len(rest) + (1 if ended else column)


def _read_jsonl(data: bytes, path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield the number and the document of every line that is not blank."""
    offset = 0
    # Only "\n" ends a line of JSON: `str.splitlines` would also cut at U+2028, which may stand inside a string.
    for number, raw in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        line = _decode(raw, where, offset)
        offset += len(raw) + 1
        if number == 1:
            line = line.removeprefix("\ufeff")
        if line.strip():
            yield str(number), _parse_line(line, where, text_field)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl}


def _parse_line(line: str, where: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}. A .jsonl file has one JSON object per line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is a JSON {type(record).__name__}: expected an object with the field '{text_field}'.")
    if text_field not in record:
        raise UserError(
            f"{where} has no field data.text_field='{text_field}'; its fields: {', '.join(record) or 'none'}."
            f"{nearest(text_field, record)}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field '{text_field}' is a {type(text).__name__}, expected a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the field '{text_field}' has half a surrogate pair at character {error.start} (an escape from "
            "\\ud800 to \\udfff on its own), which UTF-8 cannot express."
        ) from error
    return text
