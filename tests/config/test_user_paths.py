"""The home directory in paths, and URLs in place of them, which a tool refuses by name where the path must be local."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpt_jax import convert, main, report
from rpt_jax.bench import __main__ as bench
from rpt_jax.config import default_config, from_config_dict
from rpt_jax.config.dataclass_io import leaves
from rpt_jax.config.user_paths import PATH_FIELDS, check_local_path, check_location, expand_home, user_path
from rpt_jax.errors import UserError
from rpt_jax.preflight import __main__ as preflight
from rpt_jax.preflight import scaling

URL = "gs://bucket/run"


@pytest.mark.parametrize("field", PATH_FIELDS)
def test_a_field_may_be_a_url_but_no_other_text_with_a_scheme(field: str) -> None:
    config = default_config()
    if field.startswith("questions."):
        config.task = "rft"
        config.questions.source = "path"
    config.data.source = "path"
    config.update_from_flattened_dict({field: URL})
    assert dict(leaves(from_config_dict(config)))[field] == URL
    config.update_from_flattened_dict({field: "gs:/bucket/run"})
    with pytest.raises(UserError) as raised:
        from_config_dict(config)
    assert raised.value.field == field


@pytest.mark.parametrize("path", ["gs:/bucket/run", "gs://", "file:///data", "/a,gs:///b", "0.5=s3://a,0.5=s3:/b"])
def test_what_is_no_url_of_object_storage_is_refused(path: str) -> None:
    with pytest.raises(UserError) as raised:
        check_location("data.path", path)
    assert raised.value.field == "data.path"


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError) as raised:
        check_location("--workdir", "s3://key:hunter2@bucket/run")
    assert raised.value.field == "--workdir" and "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "path", [None, "", "/data/a", "0.7=/data/a, 0.3=gs://bucket/b", "abfss://container@account.dfs.core.windows.net/a"]
)
def test_paths_and_urls_are_accepted(path: str | None) -> None:
    check_location("data.path", path)


@pytest.mark.parametrize(
    "path",
    [
        "s3://bucket/texts",
        Path("gs://bucket/run"),
        "HF://org/model",
        "https://host/a.jsonl",
        "file:///data",
        "0.7=/data/a,0.3=gs://bucket/b",
        "/data/a, gs://bucket/b",
        "abfss://container@account.dfs.core.windows.net/a",
    ],
)
def test_urls_are_recognized(path: str | Path) -> None:
    with pytest.raises(UserError) as raised:
        check_local_path("data.path", path)
    assert raised.value.field == "data.path"


def test_a_url_of_the_hub_is_answered_with_the_command_that_downloads_from_it() -> None:
    with pytest.raises(UserError, match="hf download"):
        check_local_path("policy.path", "https://huggingface.co/Qwen/Qwen2.5-0.5B")


@pytest.mark.parametrize("path", [None, "", "runs/gs", "/data/a:b/c", "C:/data", "a=b/c", "10.0.0.2:/rpt", "~/x"])
def test_other_paths_are_not_taken_for_urls(path: str | None) -> None:
    check_local_path("data.path", path)


@pytest.mark.parametrize(
    ("tool", "arguments", "flag"),
    [
        (main.main, ["--config=configs/rpt_tiny.py", f"--compilation_cache={URL}"], "--compilation_cache"),
        (convert.main, ["--from", "configs/tiny", "--to", URL], "--to"),
        (report.main, ["--workdir", "run", "--output", URL], "--output"),
        (
            preflight.main,
            ["--config=configs/rpt_tiny.py", "--topology=h100:8", "--json", URL],
            "--json",
        ),
        (scaling.main, ["record.json", "--plot", URL], "--plot"),
        (bench.main, ["rollout", "--model", URL, "--prompts", "p.npz"], "--model"),
        (bench.main, ["rollout", "--model", "configs/tiny", "--prompts", URL], "--prompts"),
        (bench.main, ["data", "--tokenizer", URL], "--tokenizer"),
        (bench.main, ["reward", "--json", URL], "--json"),
    ],
)
def test_a_tool_refuses_a_url_before_it_starts(tool, arguments, flag, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool(["tool", *arguments]) == 2
    assert f"error: {flag}={URL} " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_home_directory_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = {
        "data.path": ("0.7=~/a/*.txt, 0.3=~/b,c~", "0.7=/home/me/a/*.txt, 0.3=/home/me/b,c~"),
        "data.prepared": ("~/corpus", "/home/me/corpus"),
        "policy.path": ("~/policy", "/home/me/policy"),
        "pretrain.export": ("~", "/home/me"),
        "prompt.template": ("~/a.txt", "/home/me/a.txt"),
    }
    config = default_config()
    config.data.source = "path"
    config.update_from_flattened_dict({name: path for name, (path, _) in paths.items()})
    values = dict(leaves(from_config_dict(config)))
    assert {name: values[name] for name in paths} == {name: expected for name, (_, expected) in paths.items()}


def test_the_home_directory_of_an_unknown_user_is_not_expanded() -> None:
    assert user_path("~no-such-user/runs") == Path("~no-such-user/runs")
    assert expand_home("~no-such-user/texts") == "~no-such-user/texts"
