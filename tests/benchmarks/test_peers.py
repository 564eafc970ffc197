"""Peer benchmark: widths of equal size, the protocol of the peer process, and packages that pip cannot install."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from helpers import environment

from patchloom.benchmarks import peers
from patchloom.benchmarks.findings import TINY, Scale
from patchloom.benchmarks.peer_process import PACKAGES as KNOWN
from patchloom.benchmarks.peer_process import Peer, Setting
from patchloom.benchmarks.peers import (
    NetworkSize,
    Package,
    PeerProcess,
    Unavailable,
    choose_widths,
    nearest_width,
    our_alternatives,
    setting_for,
)
from patchloom.benchmarks.plain import PlainUNet
from patchloom.benchmarks.setups import song_config

UNFINDABLE = Package("ddp", "another package", "Unet", ("no-such-package-of-patchloom",),
                     "import no_such_package", "import no_such_package")  # fmt: skip
BROKEN = Package("nobody", "a broken one", "Unet", (), "import torch", "import torch")
INSTALLED = Package("diffusers", "diffusers", "UNet2DModel", (), "import diffusers", "import diffusers")


@pytest.fixture
def no_index(tmp_path: Path) -> Iterator[None]:
    """pip without an index, and an empty cache."""
    with environment(PIP_NO_INDEX="1", PIP_FIND_LINKS="", PATCHLOOM_CACHE=str(tmp_path)):
        yield


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    with PeerProcess(sys.executable, "diffusers", setting_for(TINY)) as process:
        yield process


def built_directly(width: int) -> int:
    """Parameters of the network with two levels for 16 pixels."""
    network = UNet2DModel(
        sample_size=16, block_out_channels=(width, 2 * width), layers_per_block=1, norm_num_groups=8,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_peer_process_counts_parameters_and_the_nearest_width_is_found(peer: PeerProcess) -> None:
    parameters = {width: built_directly(width) for width in (8, 16, 24, 32)}
    assert {width: peer.size(width).parameters for width in parameters} == parameters
    for wanted in (1000, 90_000, 110_000, parameters[24], 500_000):
        width = nearest_width(lambda width: peer.size(width).parameters, wanted)
        assert width == min(parameters, key=lambda width: max(parameters[width] / wanted, wanted / parameters[width]))


def test_the_peer_process_takes_steps_and_counts_images(peer: PeerProcess) -> None:
    assert peer.train(8, 1) == TINY.batch
    assert peer.train(16, 2) == 2 * TINY.batch
    assert peer.train(8, 0) == 0


def test_the_peer_loop_reduces_the_loss() -> None:
    setting = setting_for(TINY)
    step = KNOWN["diffusers"].loop(setting, KNOWN["diffusers"].network(setting, 8).train())
    images = torch.full((8, 3, 16, 16), 127, dtype=torch.uint8)  # about zero, so the input is scaled noise
    losses = [float(step(images).detach()) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_flops_include_attention() -> None:
    """Attention has four linear layers and two products; one layer is in the encoder and two are in the decoder."""
    setting = setting_for(TINY)
    with_attention = Peer(KNOWN["diffusers"], setting).count(8).flops
    without = Peer(KNOWN["diffusers"], Setting(**{**vars(setting), "attention": []})).count(8).flops
    tokens, channels, linear = 256, 8, 4
    flops = 2 * linear * tokens * channels**2 + 2 * 2 * tokens**2 * channels
    assert with_attention - without == 3 * flops


def test_a_match_names_its_width_and_relative_size(peer: PeerProcess) -> None:
    eight, sixteen = peer.size(8), peer.size(16)
    both = choose_widths(INSTALLED, peer, NetworkSize(2 * sixteen.parameters, eight.flops))
    assert [match.description.split("; ")[0] for match in both] == [
        "UNet2DModel, width 24, nearest in parameters", "UNet2DModel, width 8, nearest in FLOPs",
    ]  # fmt: skip
    (same,) = choose_widths(INSTALLED, peer, NetworkSize(3 * eight.parameters // 2, eight.flops))
    assert same.name == "diffusers at 0.67x the parameters, 1.00x the FLOPs"


def test_patchloom_has_the_size_of_the_plain_network_and_counts_images() -> None:
    size, alternatives = our_alternatives(TINY)
    plain = PlainUNet(16, 5, 3, **song_config(16, TINY.width, TINY.blocks).network_options)
    assert size.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert alternatives["p = 1"]() == peers.STEPS * TINY.batch
    assert alternatives["p = 0.5"]() == TINY.batch * (5 + 3 * 2 + 2 * 4)  # Eq. 5: 5 full, 3 half and 2 quarter


@pytest.mark.slow
def test_packages_that_cannot_be_installed_or_fail_are_skipped_with_a_warning(
    no_index: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "PACKAGES", (UNFINDABLE, BROKEN, INSTALLED))
    found = peers.against_peers(TINY, lambda _: None)
    output = capsys.readouterr().out
    assert "another package" in output and "no-such-package-of-patchloom" in output
    assert "a broken one" in output and "KeyError: 'nobody'" in output
    assert [finding.what.split(" at ")[0] for finding in found] == [
        "Patchloom, p = 1", "Patchloom, p = 0.5", "diffusers", "  p = 1 over diffusers", "  p = 0.5 over diffusers",
    ]  # fmt: skip
    assert [entry.name for entry in (tmp_path / "peers").iterdir()] == [".lock"]  # no partial environment remains


@pytest.mark.slow
def test_a_package_runs_with_its_minimal_imports(no_index: None, capsys: pytest.CaptureFixture[str]) -> None:
    package = Package("diffusers", "diffusers", "UNet2DModel", ("no-such-package-of-patchloom",),
                      "import no_such_package", "import json")  # fmt: skip
    assert peers.interpreter_for(package, False) == sys.executable
    assert "no-such-package-of-patchloom" in capsys.readouterr().out


@pytest.mark.slow
def test_an_environment_shares_this_torch_is_kept_and_is_created_again_if_it_fails(
    no_index: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    in_cache = "import sys, numpy; assert 'peers' in sys.prefix"
    package = Package("installed", "installed package", "Unet", (), in_cache, in_cache)
    python = peers.interpreter_for(package, False)
    assert Path(python).is_relative_to(tmp_path) and peers.import_error(python, in_cache) is None
    assert capsys.readouterr().out.count(str(tmp_path)) == 1
    assert peers.interpreter_for(package, False) == python
    assert str(tmp_path) not in capsys.readouterr().out
    Path(python).unlink()
    assert peers.interpreter_for(package, False) == python
    assert capsys.readouterr().out.count(str(tmp_path)) == 1


@pytest.mark.slow
def test_another_torch_is_installed_only_for_a_measurement(no_index: None, tmp_path: Path) -> None:
    unfit = Package("unfit", "unfit", "Unet", (), "raise RuntimeError('does not fit')", "import no_such_package")
    assert not peers.wants_numbers(TINY) and peers.wants_numbers(Scale())
    with pytest.raises(Unavailable, match="does not fit"):
        peers.interpreter_for(unfit, peers.wants_numbers(TINY))
    assert [entry.name for entry in (tmp_path / "peers").iterdir()] == [".lock"]


def test_a_peer_process_that_fails_reports_its_error() -> None:
    with (
        PeerProcess(sys.executable, "diffusers", setting_for(TINY)) as peer,
        pytest.raises(Unavailable, match="divisible"),
    ):
        peer.size(12)
