"""The table of faults in docs/clusters.md lists the tests on the cluster of separate machines, and no others."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULT_FILES = ("test_lost_nodes.py", "test_scaling.py", "test_services.py")


def test_each_row_is_a_test_and_each_test_is_in_a_row() -> None:
    table = (ROOT / "docs/clusters.md").read_text().partition("## Faults\n")[2].partition("\n## ")[0]
    listed = re.findall(r"`(test_\w+)`", table)
    written = [
        name
        for file in FAULT_FILES
        for name in re.findall(r"^def (test_\w+)", (ROOT / "tests/cluster" / file).read_text(), re.MULTILINE)
    ]
    assert sorted(listed) == sorted(written)
