"""The network interface of a node's address."""

import pytest

from patchloom.platform.compute.interfaces import INTERFACE, interface_of, use_interface_of_ray


def test_loopback_address_belongs_to_the_loopback_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # reserved for documentation


@pytest.mark.ray
def test_choice_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "mine0")
    use_interface_of_ray()
    import os

    assert os.environ[INTERFACE] == "mine0"
