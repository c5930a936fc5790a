"""What belongs together is on one side of the train/held-out split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from rpt_jax.config import DataConfig
from rpt_jax.corpus.documents import Document
from rpt_jax.errors import UserError
from tests.helpers.corpora import json_lines, write_jsonl
from tests.helpers.whole_corpus import Corpus, load_corpus


def write_text(path: Path, pieces: int) -> None:
    """Write a text that is cut into `pieces` documents."""
    path.write_text("".join(f"{path.name} {i} " + "x" * 1500 + "\n\n" for i in range(pieces)))


def files(documents: Iterable[Document]) -> set[str]:
    return {document.file for document in documents}


def load(path: Path | str, **fields: object) -> Corpus:
    return load_corpus(DataConfig(source="path", path=str(path), **fields))


def test_pieces_of_a_text_file_are_on_one_side(tmp_path: Path) -> None:
    for i in range(30):
        write_text(tmp_path / f"{i}.txt", pieces=1 + i % 4)
    loaded = load(tmp_path)
    assert not files(loaded.train) & files(loaded.held_out)
    assert len(loaded.train) + len(loaded.held_out) == sum(1 + i % 4 for i in range(30)) == 73
    assert 10 <= len(loaded.held_out) <= 14, "at most a fifth, and nearly as much"
    assert len(load(tmp_path, held_out_documents=3).held_out) in (3, 4, 5, 6), "until there are three"


def test_the_split_of_a_text_file_depends_on_what_it_says(tmp_path: Path) -> None:
    for folder, name in (("one", "{}.txt"), ("two", "renamed {}.txt")):
        (tmp_path / folder).mkdir()
        for i in range(10):
            (tmp_path / folder / name.format(9 - i if folder == "two" else i)).write_text(f"text {i}")
    texts = [sorted(document.text for document in load(tmp_path / folder).held_out) for folder in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0]) == 2


@pytest.mark.parametrize("names", [["a.txt"], ["a.txt", "b.txt", "c.txt"]])
def test_of_texts_that_are_too_long_to_be_held_out_the_end_of_one_is(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_text(tmp_path / name, pieces=50)
    loaded = load(tmp_path)
    [file] = files(loaded.held_out)
    lines = [
        int(document.name.partition(":")[2]) for document in (*loaded.train, *loaded.held_out) if document.file == file
    ]
    held_out = [int(document.name.partition(":")[2]) for document in loaded.held_out]
    assert held_out == sorted(lines)[-10 * len(names) :], "one piece has a neighbor in training"
    assert len(load(tmp_path, held_out_documents=4).held_out) == 4


def test_records_with_the_same_value_of_a_field_are_on_one_side(tmp_path: Path) -> None:
    records = [{"text": f"{i}: solution {j}", "problem": {"id": i}} for i in range(80) for j in range(2)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records[::2]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(records[1::2]))

    def problems(documents: Iterable[Document]) -> set[str]:
        return {document.text.partition(":")[0] for document in documents}

    by_record = load(tmp_path)
    assert len(problems(by_record.train) & problems(by_record.held_out)) > 20
    for field in ("problem.id", "problem"):
        loaded = load(tmp_path, group_by=field)
        assert not problems(loaded.train) & problems(loaded.held_out)
        assert (len(loaded.train), len(loaded.held_out)) == (128, 32)


def test_records_of_a_file_can_be_held_out_together(tmp_path: Path) -> None:
    for i in range(10):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"{i} {j}" for j in range(5)])
    loaded = load(tmp_path, group_by="file")
    assert len(files(loaded.held_out)) == 2 and not files(loaded.train) & files(loaded.held_out)


def test_records_without_a_value_of_the_field_are_split_one_by_one_and_without_the_field_rejected(
    tmp_path: Path,
) -> None:
    records = [{"text": str(i), "id": None} for i in range(10)] + [{"text": "no id"}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    loaded = load(tmp_path, group_by="id")
    assert len(loaded.held_out) == 2 and loaded.skipped == {"no such field": 1}


def test_too_few_groups_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": str(i), "language": i % 3} for i in range(30)))
    with pytest.raises(UserError, match="form 3 groups") as raised:
        load(tmp_path, group_by="language")
    assert raised.value.field == "data.group_by"


def test_every_part_of_a_mixture_has_documents_on_both_sides(tmp_path: Path) -> None:
    write_text(tmp_path / "book.txt", pieces=40)
    write_jsonl(tmp_path / "math.jsonl", [f"problem {i}" for i in range(100)])
    (tmp_path / "notes").mkdir()
    for i in range(10):
        write_text(tmp_path / "notes" / f"{i}.txt", pieces=2)
    path = ",".join(f"1={tmp_path}/{name}" for name in ("book.txt", "math.jsonl", "notes"))
    loaded = load(path)
    for part, most in enumerate((8, 20, 4)):
        held_out = [document for document in loaded.held_out if document.mixture_part == part]
        assert 0 < len(held_out) <= most
        assert files(held_out).isdisjoint(files(d for d in loaded.train if d.mixture_part == part)) == (part == 2)


def test_of_equal_texts_in_two_groups_the_order_does_not_decide_which_is_kept(tmp_path: Path) -> None:
    records = [{"text": f"text {i // 2}", "group": f"{i % 7}"} for i in range(40)]

    def split(order: int) -> tuple[set[str], set[str]]:
        (tmp_path / "a.jsonl").write_bytes(json_lines(records[::order]))
        loaded = load(tmp_path / "a.jsonl", group_by="group")
        return {d.text for d in loaded.train}, {d.text for d in loaded.held_out}

    assert split(1) == split(-1)


def test_a_part_of_a_mixture_that_gives_nothing_is_named_with_its_first_rejected_record(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(10)])
    (tmp_path / "b.jsonl").write_bytes(json_lines({"problem": str(i)} for i in range(700)))
    (tmp_path / "c.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    config = DataConfig(source="path", path=f"0.5={tmp_path}/a.jsonl,0.5={tmp_path}/b.jsonl")
    with pytest.raises(UserError, match=r"part '.*b\.jsonl' .* no document .*b\.jsonl:1 has no field") as raised:
        load_corpus(config)
    assert raised.value.field == "data.path"
    with pytest.raises(UserError, match=r"part '.*c\.jsonl' .* 10 were read, of which 10 repeat"):
        load(f"{tmp_path}/a.jsonl,{tmp_path}/c.jsonl")
    loaded = load_corpus(dataclasses.replace(config, text_field="text,problem"))
    assert len(loaded.train) + len(loaded.held_out) == 710


def test_a_field_with_another_number_of_values_than_parts_is_refused(tmp_path: Path) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    with pytest.raises(UserError, match="2 values .* 3 parts") as raised:
        load(",".join(f"{tmp_path}/{name}.jsonl" for name in "abc"), text_field="text,problem")
    assert raised.value.field == "data.text_field"


def test_a_template_can_be_given_for_each_part(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"a|||{i}" for i in range(5)])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"q": i, "p": f"p{i}", "s": "s"}) + "\n" for i in range(5)))
    template = "|||{p},{s}"
    loaded = load(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", document_template=template)
    texts = {document.text for document in (*loaded.train, *loaded.held_out)}
    assert texts == {f"a|||{i}" for i in range(5)} | {f"p{i},s" for i in range(5)}
