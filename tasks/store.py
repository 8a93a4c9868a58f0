"""One door to files: a local folder or s3://bucket/prefix (boto3). Every write is whole or absent.

Keys are relative POSIX paths. A folder is published file by file with its manifest last, so that a
reader who asks for the manifest first never sees half a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from tasks.errors import BadInput, Damaged, StageFailed, StoreUnreachable

MANIFEST = "manifest.json"


class Store(Protocol):
    uri: str

    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def put(self, file: Path, key: str) -> None: ...
    def get(self, key: str, file: Path) -> None: ...
    def exists(self, key: str) -> bool: ...
    def names(self, prefix: str) -> list[str]: ...
    def delete(self, prefix: str) -> None: ...


class LocalStore:
    """Files under one folder of this machine (or of a mounted share)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def path(self, key: str) -> Path:
        target = (self.root / key).resolve()
        if not target.is_relative_to(self.root.resolve()):
            raise ValueError(f"key {key!r} leaves the store")
        return target

    def read(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        write_atomically(self.path(key), data)

    def put(self, file: Path, key: str) -> None:
        target = self.path(key)
        if file.resolve() == target:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.copyfile(file, partial)
        sync_and_rename(partial, target)

    def get(self, key: str, file: Path) -> None:
        if file.resolve() != self.path(key):
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path(key), file)

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def names(self, prefix: str) -> list[str]:
        """Names directly under `prefix`, sorted."""
        folder = self.path(prefix)
        return (
            sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
        )

    def delete(self, prefix: str) -> None:
        target = self.path(prefix)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


class S3Store:
    """Objects under one prefix of a bucket. Credentials and endpoint come from boto3's usual places."""

    def __init__(self, uri: str) -> None:
        parsed = urlparse(uri)
        self.uri = uri.rstrip("/")
        self.bucket = parsed.netloc
        self.prefix = parsed.path.strip("/")

    def _client(self) -> Any:
        import boto3

        return boto3.client("s3")

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    def read(self, key: str) -> bytes:
        with s3_errors(f"{self.uri}/{key}"):
            body: bytes = self._client().get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return body

    def write(self, key: str, data: bytes) -> None:
        with s3_errors(f"{self.uri}/{key}"):
            self._client().put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def put(self, file: Path, key: str) -> None:
        with s3_errors(f"{self.uri}/{key}"):
            self._client().upload_file(str(file), self.bucket, self._key(key))

    def get(self, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        with s3_errors(f"{self.uri}/{key}"):
            self._client().download_file(self.bucket, self._key(key), str(partial))
        sync_and_rename(partial, file)

    def exists(self, key: str) -> bool:
        wanted = self._key(key)
        with s3_errors(f"{self.uri}/{key}"):
            client = self._client()
            for prefix in (wanted, wanted + "/"):  # keys come sorted, so the first is the key itself if it is
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
                first = next((o["Key"] for o in page.get("Contents", [])), "")
                if first == wanted or first.startswith(wanted + "/"):
                    return True
        return False

    def names(self, prefix: str) -> list[str]:
        base = self._key(prefix).rstrip("/") + "/" if self._key(prefix) else ""
        found: set[str] = set()
        with s3_errors(f"{self.uri}/{prefix}"):
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=base, Delimiter="/"):
                found.update(p["Prefix"][len(base) :].rstrip("/") for p in page.get("CommonPrefixes", []))
                found.update(o["Key"][len(base) :] for o in page.get("Contents", []))
        return sorted(name for name in found if name)

    def delete(self, prefix: str) -> None:
        with s3_errors(f"{self.uri}/{prefix}"):
            client = self._client()
            wanted = self._key(prefix)
            if wanted:
                client.delete_object(Bucket=self.bucket, Key=wanted)
            inside = wanted + "/" if wanted else ""  # with the slash: step-1 is not the beginning of step-10
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=inside):
                if objects := [{"Key": o["Key"]} for o in page.get("Contents", [])]:
                    client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects})


class s3_errors:
    """Turn boto3's exceptions into one line that names the object and the likely remedy."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        if isinstance(error, NoCredentialsError):
            raise StageFailed(
                f"store {self.what}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from None
        if isinstance(error, ClientError) and error.response["Error"]["Code"] in ("404", "NoSuchKey"):
            raise FileNotFoundError(self.what) from None
        if isinstance(error, (BotoCoreError, Boto3Error, ClientError)):
            raise StoreUnreachable(f"store {self.what} cannot be reached: {error}") from None


def open_store(uri: str) -> Store:
    """Open the store at a path or `s3://bucket/prefix`. Raises BadInput on anything else."""
    if uri.startswith("s3://"):
        if not urlparse(uri).netloc:
            raise BadInput(f"store {uri!r}: expected s3://bucket/prefix")
        return S3Store(uri)
    if "://" in uri:
        raise BadInput(f"store {uri!r}: expected a folder or s3://bucket/prefix")
    return LocalStore(Path(uri))


def write_atomically(file: Path, data: bytes) -> None:
    """Write to a temporary name beside the target, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(partial, 0o644)
        sync_and_rename(Path(partial), file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def sync_and_rename(partial: Path, target: Path) -> None:
    """Make `partial` (a file or a folder) durable, then give it its final name in one step."""
    files = [partial] if partial.is_file() else [p for p in partial.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    os.replace(partial, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {sha256, bytes}} of every file in `folder` but the manifest itself."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in files}


def put_folder(store: Store, folder: Path, key: str, names: Iterable[str] | None = None) -> None:
    """Publish `folder` under `key`, its manifest last."""
    chosen = (
        list(names)
        if names is not None
        else [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    )
    for name in sorted(chosen, key=lambda n: (n == MANIFEST, n)):
        store.put(folder / name, f"{key}/{name}")


def get_folder(store: Store, key: str, folder: Path) -> Path:
    """A verified local copy of a published folder; on a local store, the folder itself.

    Raises Damaged when a file is missing or its SHA-256 is not the manifest's.
    """
    try:
        manifest = json.loads(store.read(f"{key}/{MANIFEST}"))
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{store.uri}/{key} holds no {MANIFEST}: nothing was published there") from None
    source = store.path(key) if isinstance(store, LocalStore) else folder
    for name, facts in manifest["files"].items():
        if source is folder and not (
            (folder / name).is_file() and sha256_file(folder / name) == facts["sha256"]
        ):
            with contextlib.suppress(FileNotFoundError):
                store.get(f"{key}/{name}", folder / name)
        if not (source / name).is_file():
            raise Damaged(f"{store.uri}/{key}/{name}: listed in the manifest but missing")
        found = sha256_file(source / name)
        if found != facts["sha256"]:
            raise Damaged(
                f"{store.uri}/{key}/{name}: SHA-256 is {found[:12]}…, the manifest says {facts['sha256'][:12]}…"
            )
    if source is folder:
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return source
