"""The record of a model that a registered version refers to: where its files are, and their checksums."""

from patchloom.platform.records.record import Record, VersionedRecord

REFERENCE_FILE = "reference.json"  # instead of the files of the model
FILES_FILE = "files.json"  # the sha256 of every file of a model folder
FILES_TAG = "files_sha256"  # the tag of a version with the sha256 of its files.json, or of its reference.json


class StoredFile(Record):
    """One file of a model in an object store."""

    size_bytes: int
    sha256: str


class StoredModel(VersionedRecord):
    """A model folder in an object store, and its files by name."""

    format_version: int = 1
    address: str
    files: dict[str, StoredFile]
