"""Copies of URLs on the local disk, with fsspec's file system in memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import fsspec
import pytest

from rpt_jax.config import default_config, from_config_dict
from rpt_jax.errors import UserError
from rpt_jax.infra import storage
from rpt_jax.infra.shared_files import share
from rpt_jax.infra.storage import RemoteCopy, fetch, fetch_inputs, push, with_urls
from tests.helpers.memory_files import URL, empty_memory_files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    return empty_memory_files(tmp_path, monkeypatch)


def there(files: fsspec.AbstractFileSystem) -> set[str]:
    """Return the names of all objects of the run."""
    return {name.removeprefix("/bucket/run/") for name in files.find("/bucket/run")}


def write(root: Path, *names: str, content: str = "x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def here(root: Path) -> dict[str, str]:
    """Return the content of all files of a copy by name, without those of its index."""
    paths = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".rpt_jax")]
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def on_an_empty_disk(url: str = URL) -> RemoteCopy:
    """Return the copy of a URL as another machine makes it."""
    copy = RemoteCopy.at(url)
    shutil.rmtree(copy.root)
    copy = RemoteCopy.at(url)
    copy.fetch("--workdir")
    return copy


def test_another_machine_gets_what_was_pushed(files: fsspec.AbstractFileSystem) -> None:
    copy = RemoteCopy.at(URL)
    written = (
        "metrics.jsonl",
        "policy/config.json",
        "checkpoints/4/state/d/1",
        "checkpoints/4/_METADATA",
        "result.json",
    )
    write(copy.root, *written, "lock", "a.partial", "checkpoints/6.orbax-checkpoint-tmp-1/state/d")
    copy.push()
    assert there(files) == {*written, "checkpoints/4.committed"}
    assert here(on_an_empty_disk().root) == dict.fromkeys(written, "x")


def test_only_what_has_changed_is_copied(files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    for name in ("put_file", "get_file"):
        function = getattr(files, name)
        monkeypatch.setattr(
            files, name, lambda a, b, f=function, n=name: (copied.append(f"{n} {Path(b).name}"), f(a, b))
        )
    copy = RemoteCopy.at(URL)
    write(copy.root, "a", "b")
    copy.push()
    write(copy.root, "b", content="longer")
    copy.push()
    copy.fetch("--workdir")
    assert copied == ["put_file a", "put_file b", "put_file b"]
    files.pipe_file("/bucket/run/a", b"of another machine")
    copy.fetch("--workdir")
    assert copied[3:] == ["get_file a.partial"]
    assert here(copy.root) == {"a": "of another machine", "b": "longer"}


def test_a_copy_becomes_what_is_there(files: fsspec.AbstractFileSystem) -> None:
    """What a killed run had not uploaded is undone: the copy is in the state that any other machine would resume from."""
    copy = RemoteCopy.at(URL)
    write(copy.root, "metrics.jsonl", "checkpoints/2/state")
    copy.push()
    write(
        copy.root, "metrics.jsonl", "checkpoints/4/state", "checkpoints/6.orbax-checkpoint-tmp-1/state", content="later"
    )
    RemoteCopy.at(URL).fetch("--workdir")
    assert here(copy.root) == {"metrics.jsonl": "x", "checkpoints/2/state": "x"}
    assert not (copy.root / "checkpoints" / "4").exists()


def test_deleted_files_are_deleted_there(files: fsspec.AbstractFileSystem) -> None:
    copy = RemoteCopy.at(URL)
    write(copy.root, "a", "checkpoints/2/state", "checkpoints/4/state")
    copy.push()
    shutil.rmtree(copy.root / "checkpoints" / "2")
    (copy.root / "a").unlink()
    copy.push()
    assert there(files) == {"checkpoints/4/state", "checkpoints/4.committed"}


@pytest.mark.parametrize("uploads", range(5))
def test_a_push_that_is_cut_short_leaves_a_state_to_resume_from(
    files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, uploads: int
) -> None:
    """Never a checkpoint without all of its files and the metrics before it, never a result without its checkpoint."""
    copy = RemoteCopy.at(URL)
    write(copy.root, "result.json", "checkpoints/4/a", "checkpoints/4/b", "metrics.jsonl")
    put_file, pipe_file = files.put_file, files.pipe_file
    left = iter(range(uploads))

    def cut_short(function):
        def call(*arguments):
            if next(left, None) is None:
                raise ConnectionError("the network is down")
            function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", cut_short(put_file))
        patch.setattr(files, "pipe_file", cut_short(pipe_file))
        patch.setattr(storage, "PARALLEL", 1)
        with pytest.raises(OSError, match=f"{URL} could not be written .*the network is down"):
            copy.push()
    order = ["metrics.jsonl", "checkpoints/4/a", "checkpoints/4/b", "checkpoints/4.committed", "result.json"]
    assert there(files) == set(order[:uploads])
    copy.push()
    assert there(files) == set(order)


@pytest.mark.parametrize("is_moving", [False, True])
def test_a_policy_that_replaces_another_one_is_without_config_json_meanwhile(
    files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, is_moving: bool
) -> None:
    copy = RemoteCopy.at(URL)
    names = ("policy/model.safetensors", "policy/config.json")
    write(copy.root, *names)
    copy.push()
    write(copy.root, *names, content="new")
    if is_moving:  # As between the two moments at which `write_policy` removes and renames config.json.
        (copy.root / "policy" / "config.json").unlink()
    found: list[bool] = []
    put_file = files.put_file

    def put(source: str, target: str) -> None:
        found.append(files.exists("/bucket/run/policy/config.json"))
        put_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", put)
        copy.push()
    assert found == [False] * (1 if is_moving else 2)
    assert there(files) == set(names[: len(found)])


def test_a_checkpoint_that_is_saved_again_is_uploaded_again_without_its_mark(
    files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RemoteCopy.at(URL)
    write(copy.root, "checkpoints/4/a", "checkpoints/4/b", content="damaged")
    copy.push()
    write(copy.root, "checkpoints/4/a", "checkpoints/4/b", content="good")
    put_file = files.put_file

    def put(source: str, target: str) -> None:
        if target.endswith("b"):
            raise ConnectionError("the network is down")
        put_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", put)
        with pytest.raises(OSError, match="the network is down"):
            copy.push()
    assert there(files) == {"checkpoints/4/a", "checkpoints/4/b"}
    copy.push()
    assert there(files) == {"checkpoints/4/a", "checkpoints/4/b", "checkpoints/4.committed"}
    assert {files.cat_file(f"/bucket/run/checkpoints/4/{name}") for name in "ab"} == {b"good"}


def test_a_checkpoint_that_is_not_committed_is_not_fetched(files: fsspec.AbstractFileSystem) -> None:
    for name in ("checkpoints/2/a", "checkpoints/2.committed", "checkpoints/4/a", "cold_start/checkpoints/1/a"):
        files.pipe_file(f"/bucket/run/{name}", b"x")
    copy = RemoteCopy.at(URL)
    copy.fetch("--workdir")
    assert here(copy.root) == {"checkpoints/2/a": "x"}


def test_a_file_that_was_not_changed_at_the_url_is_kept_without_reset(files: fsspec.AbstractFileSystem) -> None:
    """As several jobs need it that write shards of a corpus: each keeps its own, and gets those of the others."""
    copy = RemoteCopy.at(URL)
    write(copy.root, "a")
    copy.push()
    write(copy.root, "a", "b", content="mine")
    files.pipe_file("/bucket/run/c", b"theirs")
    copy.fetch("--workdir", reset=False)
    assert here(copy.root) == {"a": "mine", "b": "mine", "c": "theirs"}


def test_a_damaged_index_means_that_everything_is_copied_again(files: fsspec.AbstractFileSystem) -> None:
    copy = RemoteCopy.at(URL)
    write(copy.root, "a")
    copy.push()
    for path in copy.root.glob(".rpt_jax*"):
        path.write_text("{")
    copy = RemoteCopy.at(URL)
    copy.fetch("--workdir")
    assert here(copy.root) == {"a": "x"}


@pytest.mark.parametrize("name", ["../outside", "a/../../outside"])
def test_an_object_cannot_be_written_outside_of_the_copy(files: fsspec.AbstractFileSystem, name: str) -> None:
    files.store[f"/bucket/run/{name}"] = fsspec.implementations.memory.MemoryFile(files, f"/bucket/run/{name}", b"x")
    with pytest.raises(UserError, match="outside"):
        RemoteCopy.at(URL).fetch("--workdir")


def test_a_file_a_directory_and_a_glob_are_fetched(files: fsspec.AbstractFileSystem) -> None:
    for name in ("a.jsonl", "b.jsonl", "b.txt", "more/c.jsonl"):
        files.pipe_file(f"/bucket/texts/{name}", name.encode())
    assert fetch("memory://bucket/texts/a.jsonl", "data.path").read_text() == "a.jsonl"
    directory = fetch("memory://bucket/texts/", "data.path")
    assert set(here(directory)) == {"a.jsonl", "b.jsonl", "b.txt", "more/c.jsonl"}
    matches = fetch("memory://bucket/texts/*.jsonl", "data.path")
    assert matches.name == "*.jsonl" and set(here(matches.parent)) == {"a.jsonl", "b.jsonl"}
    assert set(here(fetch("memory://bucket/texts", "data.path", skip={"more"}))) >= {"a.jsonl"}


def test_urls_in_path_fields_become_copies_and_stand_in_messages(
    files: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    files.pipe_file("/bucket/texts/a.txt", b"a")
    files.pipe_file("/bucket/policy/config.json", b"{}")
    config = default_config()
    config.data.source = "path"
    config.data.path = f"0.5=memory://bucket/texts/a.txt, 0.5={tmp_path}"
    config.policy.path = "memory://bucket/policy"
    given = from_config_dict(config)
    fetched = fetch_inputs(given)
    assert fetched.data.path != given.data.path and with_urls(fetched.data.path) == given.data.path
    assert (Path(fetched.policy.path) / "config.json").read_text() == "{}"
    assert with_urls(f"error: {fetched.policy.path}/config.json:3") == "error: memory://bucket/policy/config.json:3"
    assert storage.named_by_urls(fetched) == storage.named_by_urls(given)


def test_a_policy_is_exported_to_a_url(files: fsspec.AbstractFileSystem) -> None:
    config = default_config()
    config.pretrain.export = "memory://bucket/base"
    directory = Path(fetch_inputs(from_config_dict(config)).pretrain.export)
    write(directory, "config.json", "policy.partial/config.json")
    push(directory)
    assert files.ls("/bucket/base", detail=False) == ["/bucket/base/config.json"]
    assert files.cat_file("/bucket/base/config.json") == b"x"


def test_a_local_path_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "a")
    push(tmp_path)
    share(tmp_path, "barrier")
    assert RemoteCopy.of(tmp_path) is None and fetch(str(tmp_path), "data.path") == tmp_path
    assert with_urls(str(tmp_path)) == str(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://bucket/run", "Protocol not known"),
        ("memory://bucket/nothing", "has no files"),
        ("memory://bucket/nothing/*.txt", "has no files"),
    ],
)
def test_a_url_that_cannot_be_used_is_an_error_about_its_field(
    files: fsspec.AbstractFileSystem, url: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        fetch(url, "data.path")
    assert raised.value.field == "data.path" and url in str(raised.value)


@pytest.mark.parametrize(("url", "extra"), [("s3://bucket/run", "s3"), ("gs://bucket/run", "gcs")])
def test_a_missing_package_is_named(
    files: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, url: str, extra: str
) -> None:
    def url_to_fs(url: str) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(UserError) as raised:
        fetch(url, "policy.path")
    assert raised.value.field == "policy.path" and f".[{extra}]" in str(raised.value)
