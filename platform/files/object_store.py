"""Object stores: a client for what pyarrow's file systems cannot do.

It writes a file in one request (pyarrow needs three or more), removes a thousand files in one, and writes under a
condition.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PLAIN_REQUESTS: Any = {"client_options": {"timeout": "20s", "connect_timeout": "5s"}}
REQUESTS = {
    "fence": PLAIN_REQUESTS,
    "files": {  # after these few attempts, `patient` decides whether to try again
        "client_options": PLAIN_REQUESTS["client_options"] | {"timeout": "300s"},
        "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=20)},
    },
}


@dataclass(frozen=True)
class ObjectFolder:
    """A folder in an object store: its client, and the keys of its files without their names.

    Methods raise OSError with the store's message, FileNotFoundError for a file that is missing.
    """

    store: "ObjectStore"
    prefix: str

    def key(self, name: str) -> str:
        """The key of a file."""
        return f"{self.prefix}/{name}".lstrip("/")

    def can_name(self, name: str) -> bool:
        """Whether the client can address a file; it refuses empty parts of a key, and dots."""
        return not {"", ".", ".."} & set(self.key(name).split("/"))

    def files(self) -> Iterator[tuple[str, int]]:
        """All files with their sizes in bytes, a thousand with each request."""
        import obstore

        with _as_os_errors():
            for batch in obstore.list(self.store, self.prefix or None, chunk_size=1000):
                for found in batch:
                    name = str(found["path"])[len(self.prefix) :].lstrip("/")
                    if name:  # not the mark of the folder itself
                        yield name, int(found["size"])

    def write(self, name: str, content: Any) -> None:
        """Write a whole file in one request, which no reader sees in part."""
        import obstore

        with _as_os_errors():
            try:
                whole = memoryview(content).cast("B")  # of Arrow it would be of signed bytes, which the client refuses
                obstore.put(self.store, self.key(name), whole, use_multipart=False)
            except FileNotFoundError:
                raise OSError("the bucket does not exist") from None

    def read_piece(self, name: str, first: int, size_bytes: int) -> bytes:
        """Some bytes of a file in one request."""
        import obstore

        with _as_os_errors():
            return bytes(obstore.get_range(self.store, self.key(name), start=first, length=size_bytes))

    def remove(self, names: list[str]) -> None:
        """Remove files, a thousand with each request. Missing files are no error."""
        import obstore

        with _as_os_errors():
            obstore.delete(self.store, [self.key(name) for name in names])


@contextmanager
def _as_os_errors() -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        raise OSError(str(error).partition("Debug source:")[0].strip()) from None


def object_folder(address: str, region: str = "", purpose: Literal["files", "fence"] = "files") -> ObjectFolder | None:
    """The folder at a remote address, with the credentials and options that pyarrow uses; None for other stores.

    Args:
        address: s3://, gs:// or abfs://, with options after a question mark as pyarrow takes them.
        region: of an S3 bucket.
        purpose: what the client is for, which decides how long it waits for an answer.
    """
    base, mark, options = address.partition("?")
    scheme, _, place = base.partition("://")
    host, _, prefix = place.partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    store = _store_at(f"{scheme}://{host}{mark}{options}", region, purpose, endpoint)
    return None if store is None else ObjectFolder(store, prefix)


@functools.lru_cache(64)
def _store_at(bucket: str, region: str, purpose: str, endpoint: str) -> "ObjectStore | None":
    import obstore.store

    base, _, text = bucket.partition("?")
    scheme, _, host = base.partition("://")
    if scheme == "s3":
        options = {name: values[-1] for name, values in parse_qs(text).items()}
        return _s3_store(host, options, region, endpoint, REQUESTS[purpose])
    if scheme in ("gs", "gcs"):
        return obstore.store.GCSStore(host.rpartition("@")[2], **REQUESTS[purpose])
    if scheme in ("abfs", "abfss"):
        return obstore.store.from_url(f"{scheme}://{host}", **REQUESTS[purpose])
    return None


def _s3_store(host: str, options: dict[str, str], region: str, endpoint: str, settings: Any) -> "ObjectStore":
    import obstore.store

    keys, _, bucket = host.rpartition("@")
    config: Any = {"region": region} if region else {}
    own = options.get("endpoint_override")
    if own:
        endpoint = own if "://" in own else f"{options.get('scheme', 'https')}://{own}"
    if endpoint:
        config["endpoint"] = endpoint
    if keys:
        key, _, secret = keys.partition(":")
        config |= {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
    client = settings["client_options"] | {"allow_http": endpoint.startswith("http://")}
    settings = settings | {"client_options": client}
    make = partial(obstore.store.S3Store, bucket, config=config, **settings)
    provider = None if keys else _boto3_credentials()
    return make(credential_provider=provider) if provider else make()


def _boto3_credentials() -> Any:
    """Credentials of boto3, which reads ~/.aws; None if they are in the environment, or without boto3."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    session = Session()
    return Boto3CredentialProvider(session) if session.get_credentials() else None
