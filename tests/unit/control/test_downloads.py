"""Signed links: what they give away, for how long, and that nothing else can be made of them."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from email.utils import parsedate_to_datetime

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey, read_safetensors
from homefire.control.download_links import LIFETIME_S, DownloadLinks, Grant
from homefire.foundation.clock import ManualClock, rfc3339
from homefire.foundation.home import Home
from homefire.wire.errors import PermissionDenied
from homefire.wire.tensors import digest_tensors

from .root_plane import JOB, RUN, TARGET, adapter_tensors

SAMPLER, STATE, EXTERNAL = CheckpointFamily
CHECKPOINTS = f"training_runs/{RUN}/checkpoints"
URL = "http://127.0.0.1:8700"
NO_ACCOUNT = {"x-homefire-account": ""}
"""As the gateway forwards a request without a key."""


async def fetch(root, url: str, *, expect: int = 200, **headers: str):
    """Without a key, by the path of the link alone."""
    assert url.startswith(URL)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await root.control.client.get(url.removeprefix(URL), headers={**NO_ACCOUNT, **names})
    assert answer.status_code == expect, answer.text
    return answer


async def file_urls(root, name: str = "mark", *, expect: int = 200):
    path = f"{CHECKPOINTS}/external_weights/{name}/external_weights_urls"
    return await root.call("GET", path, expect=expect)


async def archive_url(root, checkpoint: str, *, expect: int = 302) -> str:
    answer = await root.control.client.get(f"/api/v1/{CHECKPOINTS}/{checkpoint}/archive")
    assert answer.status_code == expect, answer.text
    expires = parsedate_to_datetime(answer.headers["expires"]).timestamp()
    assert expires == int(root.clock.now() + LIFETIME_S)
    return answer.headers["location"]


async def test_every_file_of_external_weights_comes_whole_without_a_key(root):
    manifest = root.save("mark", EXTERNAL)
    answer = await file_urls(root)
    assert answer["urls"].keys() == manifest.files.keys()
    assert answer["expires"] == rfc3339(root.clock.now() + LIFETIME_S)
    directory = root.store.directory(CheckpointKey.of(manifest))
    for name, url in answer["urls"].items():
        assert url.endswith(f"/{name}")
        fetched = await fetch(root, url)
        assert fetched.content == (directory / name).read_bytes()
        assert int(fetched.headers["content-length"]) == manifest.files[name].size_bytes


async def test_a_broken_download_goes_on_where_it_stopped(root):
    root.save("mark", EXTERNAL)
    url = (await file_urls(root))["urls"]["adapter_model.safetensors"]
    whole = (await fetch(root, url)).content
    rest = await fetch(root, url, expect=206, range="bytes=100-")
    assert rest.content == whole[100:]
    assert rest.headers["content-range"] == f"bytes 100-{len(whole) - 1}/{len(whole)}"


async def test_only_external_weights_have_links_to_their_files(root):
    root.save("mark")
    path = f"{CHECKPOINTS}/weights/mark/external_weights_urls"
    refused = await root.call("GET", path, expect=400)
    assert refused["error"]["code"] == "wrong_checkpoint_kind"
    await file_urls(root, "nope", expect=404)


async def test_a_link_ends(root):
    root.save("mark", EXTERNAL)
    url = (await file_urls(root))["urls"]["adapter_config.json"]
    root.clock.advance(LIFETIME_S - 1.0)
    await fetch(root, url)
    root.clock.advance(1.0)
    refused = await fetch(root, url, expect=403)
    assert "expired" in refused.json()["error"]["message"]


@pytest.mark.parametrize("change", ["delete", "expire"])
async def test_a_link_to_what_is_gone_says_so(root, change):
    key = CheckpointKey.of(root.save("mark", EXTERNAL))
    url = (await file_urls(root))["urls"]["adapter_config.json"]
    if change == "delete":
        root.store.delete(key)
    else:
        root.store.expire_at(key, root.clock.now())
    assert "not there any more" in (await fetch(root, url, expect=404)).json()["error"]["message"]


async def test_a_link_does_not_lead_to_what_replaced_its_checkpoint(root):
    root.save("mark", seed=1)
    url = await archive_url(root, "weights/mark")
    await fetch(root, url)
    root.save("mark", seed=2, overwrite=True)
    await fetch(root, url, expect=404)


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = {}
        for member in tar.getmembers():
            assert member.isreg()
            file = tar.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
        return found


async def test_the_archive_of_a_snapshot_holds_its_files_bit_for_bit(root):
    manifest = root.save("mark", SAMPLER)
    answer = await fetch(root, await archive_url(root, "sampler_weights/mark"))
    assert int(answer.headers["content-length"]) == len(answer.content)
    found = members(answer.content)
    assert found.pop("checkpoint_complete") == b""
    directory = root.store.directory(CheckpointKey.of(manifest))
    assert found == {name: (directory / name).read_bytes() for name in manifest.files}


async def test_the_archive_of_an_adapters_state_is_its_peft_directory(root, tmp_path):
    """Masters of an adapter are the adapter; the optimizer stays."""
    root.save("mark", seed=3)
    found = members((await fetch(root, await archive_url(root, "weights/mark"))).content)
    assert found.keys() == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "checkpoint_complete",
    }
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(found["adapter_model.safetensors"])
    assert digest_tensors(read_safetensors(weights)) == digest_tensors(adapter_tensors(3))
    config = json.loads(found["adapter_config.json"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 32.0)
    assert config["target_modules"] == [TARGET]


async def test_any_range_of_an_archive_is_that_part_of_it(root):
    root.save("mark", SAMPLER)
    url = await archive_url(root, "sampler_weights/mark")
    whole = (await fetch(root, url)).content
    for start, end in ((0, 511), (500, 700), (len(whole) - 1025, len(whole) - 1)):
        part = await fetch(root, url, expect=206, range=f"bytes={start}-{end}")
        assert part.content == whole[start : end + 1]


async def test_a_delta_has_no_archive(root, bench):
    base = bench.save_snapshot("a", job=JOB, slot=RUN)
    bench.save_snapshot("b", job=JOB, slot=RUN, parent=base)
    refused = await root.call("GET", f"{CHECKPOINTS}/sampler_weights/b/archive", expect=400)
    assert "delta of 'a'" in refused["error"]["message"]


async def test_a_head_tells_the_size(root):
    root.save("mark", EXTERNAL)
    url = (await file_urls(root))["urls"]["adapter_config.json"]
    head = await root.control.client.head(url.removeprefix(URL), headers=NO_ACCOUNT)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len((await fetch(root, url)).content)


# Tokens -----------------------------------------------------------------------------------------

GRANT = Grant(
    CheckpointKey("local", JOB, RUN, EXTERNAL, "mark"),
    "9f86",
    "adapter_config.json",
    1_800_000_060.0,
)


@pytest.fixture
def make_links():
    def make(key: bytes = b"k" * 32, at: float = 1_800_000_000.0) -> DownloadLinks:
        return DownloadLinks(url=URL, key=key, clock=ManualClock(at))

    return make


def token_of(url: str) -> str:
    return url.removeprefix(f"{URL}/api/v1/downloads/").partition("/")[0]


def test_a_token_means_what_was_signed(make_links):
    assert make_links().read(token_of(make_links().sign(GRANT))) == GRANT


def test_no_altered_token_means_anything(make_links):
    """Every single character, in content and signature alike."""
    links = make_links()
    token = token_of(links.sign(GRANT))
    for place, character in enumerate(token):
        for other in "A_":
            altered = f"{token[:place]}{other}{token[place + 1 :]}"
            if character != other:
                with pytest.raises(PermissionDenied):
                    links.read(altered)


def test_no_forged_token_means_anything(make_links):
    token = token_of(make_links().sign(GRANT))
    content, _, signature = token.partition(".")
    empty = base64.urlsafe_b64encode(b"").decode()
    for forged in (
        "",
        ".",
        content,
        f"{content}.",
        f".{signature}",
        f"{empty}.{signature}",
        f"{token}=",
        f"{token}.{signature}",
        f"{content}.{signature[:-1]}",
        token_of(make_links(b"another key of 32 bytes ........").sign(GRANT)),
        "A" * 100_000,
        "ä.ö",
        "../../etc/passwd",
    ):
        with pytest.raises(PermissionDenied, match="no download link"):
            make_links().read(forged)


def test_a_token_ends_at_its_time(make_links):
    token = token_of(make_links().sign(GRANT))
    assert make_links(at=GRANT.expires_at - 0.5).read(token) == GRANT
    with pytest.raises(PermissionDenied, match="expired"):
        make_links(at=GRANT.expires_at).read(token)


async def test_a_link_opens_no_other_file_and_no_other_path(root):
    """The name behind the token is decoration; the token names the file."""
    root.save("mark", EXTERNAL)
    url = (await file_urls(root))["urls"]["adapter_config.json"]
    config = (await fetch(root, url)).content
    stem = url.rpartition("/")[0]
    for name in ("adapter_model.safetensors", "manifest.json", "x"):
        assert (await fetch(root, f"{stem}/{name}")).content == config
    await fetch(root, f"{stem}/more/segments", expect=404)
    await fetch(root, stem, expect=404)


async def test_without_a_key_nothing_else_is_answered(root):
    for path in (
        "/api/v1/checkpoints",
        "/api/v1/sessions",
        "/v1/accounts",
        "/api/v1/training_runs",
    ):
        answer = await root.control.client.get(path, headers=NO_ACCOUNT)
        assert answer.status_code == 401


def test_the_key_of_links_is_the_homes_own_and_stays(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    key = home.download_key()
    home.prepare()
    assert home.download_key() == key
    assert len(key) == 32
    assert home.download_key_file.stat().st_mode & 0o777 == 0o600
