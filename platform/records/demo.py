"""The record of a finished demo: `demo.json`."""

from patchloom.platform.records.record import VersionedRecord

DEMO_FILE = "demo.json"


class DemoCard(VersionedRecord):
    """What a demo made, and with which commands."""

    format_version: int = 1
    kind: str = "demo"
    chain: str  # name of the registered model
    commands: list[str]
    model: str  # models:/NAME/VERSION
    tracking_uri: str
