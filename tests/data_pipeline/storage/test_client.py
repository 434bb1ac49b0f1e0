"""Who may read what: credentials from the usual places, settings and URLs that are refused, secrets kept."""

from __future__ import annotations

import logging
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage.client import (
    ChangedObjectError,
    ObjectInfo,
    client_of,
    forget_clients,
    used_in_this_process,
)
from triweave.data_pipeline.storage.credentials import store_options
from triweave.data_pipeline.storage.files import read_file
from triweave.data_pipeline.storage.location import is_remote, object_location, shown
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.stream.transport import start_method

SECRET = "not-to-be-seen-anywhere"


@pytest.mark.parametrize(
    ("url", "bucket", "key"),
    [
        ("s3://corpora/a/b", "corpora", "a/b"),
        ("s3:/corpora/a//b/", "corpora", "a/b"),
        ("s3://corpora", "corpora", ""),
        ("S3://corpora/A b", "corpora", "A b"),
    ],
)
def test_urls(url: str, bucket: str, key: str) -> None:
    location = object_location(Path(url) if "//c" not in url else url)
    assert (location.bucket, location.key) == (bucket, key)
    assert shown(Path(url)) == f"s3://{bucket}/{key}"
    assert str(location.child("x.tar")) == f"s3://{bucket}/{key + '/' if key else ''}x.tar"


def test_paths_are_no_urls() -> None:
    assert not any(is_remote(path) for path in ("s3", "a/s3:/b", "/s3:/b", "s3:///b", "./s3:/b", "file:///s3"))


@pytest.mark.parametrize("url", ["s3://", "s3://ab/x", "s3://a_b/x", "s3://corpora/../x", f"s3://corpora/{'x' * 1025}"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(StorageError):
        object_location(url)


def test_what_is_no_url_is_named_as_it_was_written() -> None:
    with pytest.raises(StorageError, match=r"^/shards/x: is no s3://BUCKET/PREFIX"):
        object_location("/shards/x")


@pytest.mark.parametrize("value", ["x", "-1", "nan", "1e12"])
def test_settings_out_of_range_are_named(value: str) -> None:
    with pytest.raises(StorageError, match=rf"TRIWEAVE_CACHE_GB={value}: must be a number from 0 to 1e\+09"):
        StorageSettings.from_environment({"TRIWEAVE_CACHE_GB": value, "HOME": "/"})


def test_settings_default_to_the_users_cache() -> None:
    settings = StorageSettings.from_environment({"XDG_CACHE_HOME": "/somewhere"})
    assert settings == StorageSettings(cache_dir=Path("/somewhere/triweave"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        f"[default]\naws_access_key_id = AK1\naws_secret_access_key = {SECRET}\n"
        f"[team]\naws_access_key_id = AK2\naws_secret_access_key = {SECRET}2\naws_session_token = token\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[profile team]\nregion = eu-north-1\nendpoint_url = https://store.example\n[profile login]\nsso_region = x\n"
    )
    return tmp_path


def test_a_profile_gives_keys_region_and_endpoint(home: Path) -> None:
    assert store_options({"HOME": str(home)}) == {"access_key_id": "AK1", "secret_access_key": SECRET}
    assert store_options({"HOME": str(home), "AWS_PROFILE": "team"}) == {
        "access_key_id": "AK2",
        "secret_access_key": f"{SECRET}2",
        "session_token": "token",
        "endpoint": "https://store.example",
        "region": "eu-north-1",
    }


def test_variables_come_before_profiles(home: Path) -> None:
    keys = {"HOME": str(home), "AWS_ACCESS_KEY_ID": "AK3", "AWS_SECRET_ACCESS_KEY": "x"}
    assert store_options(keys) == {}
    assert store_options(keys | {"AWS_PROFILE": "team", "AWS_REGION": "r"}) == {
        "endpoint": "https://store.example",
        "region": "r",
    }


@pytest.mark.parametrize(
    ("profile", "message"),
    [("nobody", "AWS_PROFILE=nobody: no such profile"), ("login", "holds no access key .*export-credentials")],
)
def test_profiles_without_keys_are_refused(home: Path, profile: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        store_options({"HOME": str(home), "AWS_PROFILE": profile})


@pytest.mark.parametrize("endpoint", ["store.example", "ftp://store.example", "http://user:word@store", "https://"])
def test_endpoints_that_are_none_are_refused(endpoint: str, home: Path) -> None:
    with pytest.raises(StorageError, match="must be http:// or https:// and a host"):
        store_options({"HOME": str(home), "AWS_ENDPOINT_URL": endpoint})


def test_a_damaged_credentials_file_is_not_quoted(home: Path) -> None:
    (home / ".aws" / "credentials").write_text(f"aws_secret_access_key {SECRET}")
    with pytest.raises(StorageError, match="cannot be read as an AWS credentials file") as caught:
        store_options({"HOME": str(home)})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_versions_of_an_object_are_never_mixed(store: Any) -> None:
    store.store("corpora/x", b"hello")
    client = client_of("corpora")
    info = client.info("x")
    store.store("corpora/x", b"other")
    with pytest.raises(ChangedObjectError):
        client.range("x", 0, 2, info)
    assert bytes(client.range("x", 0, 2, client.info("x"))) == b"ot"


def _head(url: str, answers: Any) -> None:
    try:
        answers.put(bytes(read_file(url)))
    except BaseException as error:
        answers.put(type(error).__name__)


def test_workers_are_not_forked_once_a_store_was_used(store: Any) -> None:
    store.store("corpora/x", b"hello")
    assert bytes(read_file("s3://corpora/x")) == b"hello"
    assert used_in_this_process()
    assert start_method() == "spawn"
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    child = context.Process(target=_head, args=("s3://corpora/x", answers))
    child.start()
    assert answers.get() == b"hello"
    child.join()
    forget_clients()
    assert start_method() == "fork"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            (404, "NoSuchBucket"),
            "^s3://corpora: http://127.0.0.1:[0-9]+ has no such bucket; make it, or check its name",
        ),
        ((403, "AccessDenied"), r"the store refuses \(403 Forbidden, AccessDenied\); check AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_no_repetition_mends_is_said_at_once(store: Any, failure: tuple[int, str], message: str) -> None:
    client = client_of("corpora")
    store.failure = failure
    for ask in (lambda: client.names("x"), lambda: client.range("x", 0, 1, ObjectInfo(size=1, etag="", modified=""))):
        store.log.clear()
        with pytest.raises(StorageError, match=message):
            ask()
        assert len(store.log) == 1


@pytest.mark.slow
def test_radosgw_refuses_wrong_keys_and_secrets_stay_secret(
    ceph: Any, use_store: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    for wrong in ({"AWS_SECRET_ACCESS_KEY": SECRET}, {"AWS_ACCESS_KEY_ID": SECRET}):
        use_store(ceph.environment | wrong)
        with caplog.at_level(logging.DEBUG), pytest.raises(StorageError, match="the store refuses") as caught:
            read_file("s3://corpora/x")
        assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text
        with pytest.raises(StorageError, match="the store refuses"):
            client_of("corpora").names("x")


@pytest.mark.slow
def test_radosgw_has_no_such_bucket(ceph: Any, use_store: Callable[..., None]) -> None:
    use_store(ceph.environment)
    client = client_of("elsewhere")
    for ask in (lambda: client.names("x"), lambda: client.put("x", b"hello", "", "create")):
        with pytest.raises(StorageError, match=r"^s3://elsewhere: .* has no such bucket"):
            ask()


@pytest.mark.slow
def test_radosgw_keeps_to_conditions_and_ranges(ceph: Any, use_store: Callable[..., None]) -> None:
    use_store(ceph.environment)
    client = client_of("corpora")
    client.put("conditions/x", b"hello", "00ff", "create")
    with pytest.raises(FileExistsError):
        client.put("conditions/x", b"other", "00ff", "create")
    info = client.info("conditions/x")
    assert (info.size, info.xxh3) == (5, "00ff")
    assert bytes(client.range("conditions/x", 1, 3, info)) == b"el"
    assert client.names("conditions") == {"x": 5}
    client.put("conditions/x", b"other", "", "overwrite")
    with pytest.raises(ChangedObjectError):
        client.range("conditions/x", 1, 3, info)
    client.delete("conditions/x")
    client.delete("conditions/x")
    with pytest.raises(FileNotFoundError):
        client.info("conditions/x")
