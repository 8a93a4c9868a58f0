"""One door to files: a folder and S3 behave alike, writes are whole or absent, copies are verified."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tasks.errors import BadInput, Damaged, StageFailed
from tasks.store import (
    MANIFEST,
    LocalStore,
    S3Store,
    folder_manifest,
    get_folder,
    open_store,
    put_folder,
    sha256_file,
    sha256_json,
    sync_and_rename,
    write_atomically,
)


@pytest.fixture(params=["local", "s3", "s3 without prefix"])
def store(request, tmp_path):
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue("s3")
    return open_store("s3://bucket/some/prefix/" if request.param == "s3" else "s3://bucket")


def test_write_read_overwrite(store):
    store.write("a/b.bin", b"\x00one")
    assert store.read("a/b.bin") == b"\x00one"
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    store.write("empty", b"")
    assert store.read("empty") == b""


def test_missing_keys_are_file_not_found(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        store.read("no/such")
    with pytest.raises(FileNotFoundError):
        store.get("no/such", tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]


def test_put_and_get_files(store, tmp_path):
    source = tmp_path / "in.bin"
    source.write_bytes(os.urandom(100_000))
    store.put(source, "deep/er/in.bin")
    store.get("deep/er/in.bin", tmp_path / "new" / "folder" / "out.bin")
    assert (tmp_path / "new" / "folder" / "out.bin").read_bytes() == source.read_bytes()
    assert os.listdir(tmp_path / "new" / "folder") == ["out.bin"]


def test_exists_is_about_whole_names(store):
    store.write("jobs/ftjob-12/job.json", b"{}")
    assert store.exists("jobs/ftjob-12/job.json")
    assert store.exists("jobs/ftjob-12")
    assert store.exists("jobs")
    assert not store.exists("jobs/ftjob-1")
    assert not store.exists("jobs/ftjob-12/job")


def test_exists_is_not_hidden_by_neighbours(store):
    """Object stores list by prefix, and "-" sorts before "/"."""
    for number in range(15):
        store.write(f"models/icd-{number:02d}/x", b"")
    assert not store.exists("models/icd")
    store.write("models/icd/x", b"")
    assert store.exists("models/icd")


def test_names_lists_one_level_sorted(store):
    for key in ("jobs/b/job.json", "jobs/a/job.json", "jobs/a/deep/x", "jobs/loose", "other/x"):
        store.write(key, b"1")
    assert store.names("jobs") == ["a", "b", "loose"]
    assert store.names("jobs/a") == ["deep", "job.json"]
    assert store.names("") == ["jobs", "other"]
    assert store.names("nothing") == []


def test_listing_and_deleting_go_past_one_page(s3, monkeypatch):
    store = open_store("s3://bucket/p")
    for number in range(17):
        s3.put_object(Bucket="bucket", Key=f"p/many/{number:02d}/x", Body=b"")
    s3.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 5}
    )
    monkeypatch.setattr(store, "_client", lambda: s3)
    assert len(s3.list_objects_v2(Bucket="bucket")["Contents"]) == 5
    assert store.names("many") == [f"{number:02d}" for number in range(17)]
    store.delete("many")
    assert store.names("many") == []


def test_delete_takes_a_file_or_a_whole_folder_and_nothing_beside(store):
    for key in ("c/step-1/a", "c/step-1/b/c", "c/step-10/a", "c/step-1.txt", "single"):
        store.write(key, b"1")
    store.delete("c/step-1")
    assert store.names("c") == ["step-1.txt", "step-10"]
    assert store.read("c/step-10/a") == b"1"
    store.delete("single")
    assert not store.exists("single")
    store.delete("never/was")  # nothing to do


def test_two_prefixes_of_a_bucket_do_not_see_each_other(s3):
    one, two = open_store("s3://bucket/one"), open_store("s3://bucket/one-more")
    one.write("x", b"1")
    two.write("x", b"2")
    assert one.read("x") == b"1"
    assert one.names("") == ["x"]
    one.delete("")
    assert not one.exists("x")
    assert two.read("x") == b"2"


def filled(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(256)))
    (folder / MANIFEST).write_text(json.dumps({"step": 3, "files": folder_manifest(folder)}))
    return folder


def test_publish_and_fetch_a_folder(store, tmp_path):
    put_folder(store, filled(tmp_path / "in"), "models/one")
    got = get_folder(store, "models/one", tmp_path / "out")
    assert (got / "a.txt").read_text() == "alpha"
    assert (got / "sub" / "b.bin").read_bytes() == bytes(range(256))
    assert json.loads((got / MANIFEST).read_text())["step"] == 3
    # A local store is not copied: its own folder is the answer.
    assert (got == tmp_path / "out") == isinstance(store, S3Store)
    assert get_folder(store, "models/one", tmp_path / "out") == got


def test_the_manifest_is_published_last(tmp_path):
    order: list[str] = []

    class Watched(LocalStore):
        def put(self, file, key):
            order.append(key)
            super().put(file, key)

    put_folder(Watched(tmp_path / "store"), filled(tmp_path / "in"), "m")
    assert order == ["m/a.txt", "m/sub/b.bin", f"m/{MANIFEST}"]


def test_a_folder_that_was_never_finished_is_refused(store, tmp_path):
    put_folder(store, filled(tmp_path / "in"), "m", names=["a.txt"])
    with pytest.raises(Damaged, match=r"holds no manifest\.json"):
        get_folder(store, "m", tmp_path / "out")


def test_a_changed_file_is_refused(store, tmp_path):
    put_folder(store, filled(tmp_path / "in"), "m")
    store.write("m/a.txt", b"beta")
    with pytest.raises(Damaged, match=r"a\.txt: SHA-256 is .*, the manifest says"):
        get_folder(store, "m", tmp_path / "out")


def test_a_lost_file_is_refused(store, tmp_path):
    put_folder(store, filled(tmp_path / "in"), "m")
    store.delete("m/sub/b.bin")
    with pytest.raises(Damaged, match=r"b\.bin: listed in the manifest but missing"):
        get_folder(store, "m", tmp_path / "out")


def test_a_damaged_local_copy_is_fetched_again(s3, tmp_path):
    store = open_store("s3://bucket/p")
    put_folder(store, filled(tmp_path / "in"), "m")
    get_folder(store, "m", tmp_path / "out")
    (tmp_path / "out" / "a.txt").write_text("damaged")
    (tmp_path / "out" / "sub" / "b.bin").unlink()
    kept = tmp_path / "out" / MANIFEST
    kept.unlink()
    get_folder(store, "m", tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "alpha"
    assert (tmp_path / "out" / "sub" / "b.bin").exists()
    assert kept.exists()


def test_an_unreachable_store_is_one_line(s3, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        store = open_store("s3://bucket/p")
        source = tmp_path / "f"
        source.write_text("x")
        for act in (
            lambda: store.read("x"),
            lambda: store.write("x", b""),
            lambda: store.put(source, "x"),
            lambda: store.get("x", tmp_path / "g"),
            lambda: store.exists("x"),
            lambda: store.names("x"),
            lambda: store.delete("x"),
        ):
            with pytest.raises(StageFailed, match=r"store s3://bucket/p/x cannot be reached") as caught:
                act()
            assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["f"]


def test_missing_credentials_say_what_to_set(s3, monkeypatch, tmp_path):
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers the credentials it has seen
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StageFailed, match=r"no credentials\. Set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket/p").read("x")


def test_a_missing_bucket_is_not_a_missing_file(s3):
    with pytest.raises(StageFailed, match="NoSuchBucket"):
        open_store("s3://other-bucket/p").read("x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///prefix", "gs://bucket/x", "http://host/x"])
def test_addresses_that_are_no_store(uri):
    with pytest.raises(BadInput, match="expected"):
        open_store(uri)


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd"])
def test_keys_stay_inside_a_local_store(tmp_path, key):
    store = open_store(str(tmp_path / "store"))
    for act in (store.read, store.exists, store.names, store.delete, lambda k: store.write(k, b"x")):
        with pytest.raises(ValueError, match="leaves the store"):
            act(key)
    assert not (tmp_path / "outside").exists()


def test_a_link_out_of_a_local_store_is_not_followed(tmp_path):
    store = open_store(str(tmp_path / "store"))
    store.write("a", b"")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leaves the store"):
        store.read("link")


def test_half_written_names_are_not_listed(tmp_path):
    store = LocalStore(tmp_path)
    store.write("d/whole", b"1")
    (tmp_path / "d" / ".whole.123.part").write_bytes(b"half")
    assert store.names("d") == ["whole"]


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "f"
    write_atomically(target, b"old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_written_files_can_be_read_by_others(tmp_path):
    write_atomically(tmp_path / "f", b"x")
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644


def test_sync_and_rename_moves_folders(tmp_path):
    filled(tmp_path / "part")
    sync_and_rename(tmp_path / "part", tmp_path / "whole")
    assert os.listdir(tmp_path) == ["whole"]
    assert (tmp_path / "whole" / "sub" / "b.bin").exists()


def test_digests(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "f") == abc
    assert sha256_json({"b": 1, "a": [1.5, "é"]}) == sha256_json({"a": [1.5, "é"], "b": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": "1"})


def test_manifest_of_a_folder(tmp_path):
    filled(tmp_path / "m")
    manifest = folder_manifest(tmp_path / "m")
    assert list(manifest) == ["a.txt", "sub/b.bin"]
    assert manifest["sub/b.bin"] == {"sha256": sha256_file(tmp_path / "m" / "sub" / "b.bin"), "bytes": 256}
