"""`homefire up --store`: which store a home has, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from homefire.checkpoints.s3_server import Reply, S3Server
from homefire.cli.home_store import check_store
from homefire.wire.errors import InvalidArgument, StorageFailed

URL = "s3://bucket/prefix"


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("HOMEFIRE_STORE_CACHE", str(tmp_path / "cache"))
    with S3Server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_home_remembers_its_store(home, server):
    assert home.store_root == str(home.store)
    check_store(home, None)
    assert home.store_root == str(home.store)
    check_store(home, URL)
    assert home.store_root == URL
    check_store(home, None)
    check_store(home, URL)
    with pytest.raises(InvalidArgument, match="are in s3://bucket/prefix"):
        check_store(home, "s3://bucket/other")


def test_a_home_with_checkpoints_of_its_own_is_not_moved_away_from_them(home, server):
    folder = home.store / "local/job-1/policy/sampler/a"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="the checkpoints of this home are in"):
        check_store(home, URL)


@pytest.mark.parametrize("url", ["/a/directory", "gs://bucket/x"])
def test_what_is_no_bucket_is_refused(home, url):
    with pytest.raises(InvalidArgument, match="is no bucket"):
        check_store(home, url)
    assert not home.store_url_file.exists()


def test_a_store_that_cannot_be_reached_is_not_remembered(home, server, monkeypatch):
    server.faults.append(lambda asked, honest: Reply(403))
    with pytest.raises(StorageFailed, match="credentials"):
        check_store(home, URL)
    assert not home.store_url_file.exists()
