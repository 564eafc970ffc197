"""Peers: widths of equal size against networks built directly, the child's protocol, and what pip cannot find."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from helpers import environment

from patchloom.benchmarks import peers
from patchloom.benchmarks.findings import TINY, Scale
from patchloom.benchmarks.peer import PACKAGES as KNOWN
from patchloom.benchmarks.peer import Peer, Setting
from patchloom.benchmarks.peers import Child, NotHere, Package, Size, chosen, nearest_width, our_ways, setting_of
from patchloom.benchmarks.plain import PlainUNet
from patchloom.benchmarks.setups import song_config

UNFINDABLE = Package("ddp", "another package", "Unet", ("no-such-package-of-patchloom",),
                     "import no_such_package", "import no_such_package")  # fmt: skip
BROKEN = Package("nobody", "a broken one", "Unet", (), "import torch", "import torch")
INSTALLED = Package("diffusers", "diffusers", "UNet2DModel", (), "import diffusers", "import diffusers")


@pytest.fixture
def no_index(tmp_path: Path) -> Iterator[None]:
    """pip that asks nobody, and an empty cache."""
    with environment(PIP_NO_INDEX="1", PIP_FIND_LINKS="", PATCHLOOM_CACHE=str(tmp_path)):
        yield


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(sys.executable, "diffusers", setting_of(TINY)) as at_work:
        yield at_work


def built_directly(width: int) -> int:
    """Parameters of the two-level network of 16 pixels."""
    network = UNet2DModel(
        sample_size=16, block_out_channels=(width, 2 * width), layers_per_block=1, norm_num_groups=8,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip
    return sum(parameter.numel() for parameter in network.parameters())


def test_a_child_counts_what_a_network_built_directly_has_and_takes_the_nearest_width(child: Child) -> None:
    parameters = {width: built_directly(width) for width in (8, 16, 24, 32)}
    assert {width: child.size(width).parameters for width in parameters} == parameters
    for wanted in (1000, 90_000, 110_000, parameters[24], 500_000):
        width = nearest_width(lambda width: child.size(width).parameters, wanted)
        assert width == min(parameters, key=lambda one: max(parameters[one] / wanted, wanted / parameters[one]))


def test_a_child_takes_the_steps_it_is_asked_for_and_counts_their_images(child: Child) -> None:
    assert child.train(8, 1) == TINY.batch
    assert child.train(16, 2) == 2 * TINY.batch
    assert child.train(8, 0) == 0


def test_what_a_child_trains_on_the_same_images_it_learns() -> None:
    setting = setting_of(TINY)
    step = KNOWN["diffusers"].loop(setting, KNOWN["diffusers"].network(setting, 8).train())
    images = torch.full((8, 3, 16, 16), 127, dtype=torch.uint8)  # about zero: what is seen is the noise, scaled
    losses = [float(step(images).detach()) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_flops_are_those_of_convolutions_and_products_attention_included() -> None:
    """An attention has four linear layers and two products, and stands once on the way down and twice on the way up."""
    setting = setting_of(TINY)
    with_attention = Peer(KNOWN["diffusers"], setting).count(8)["flops"]
    without = Peer(KNOWN["diffusers"], Setting(**{**vars(setting), "attention": []})).count(8)["flops"]
    tokens, channels, linear = 256, 8, 4
    one = 2 * linear * tokens * channels**2 + 2 * 2 * tokens**2 * channels
    assert with_attention - without == 3 * one


def test_words_say_in_what_a_network_is_equal_and_by_how_much(child: Child) -> None:
    eight, sixteen = child.size(8), child.size(16)
    both = chosen(INSTALLED, child, Size(2 * sixteen.parameters, eight.flops))
    assert [match.words.split("; ")[0] for match in both] == [
        "UNet2DModel, width 24, nearest in parameters", "UNet2DModel, width 8, nearest in FLOPs",
    ]  # fmt: skip
    (same,) = chosen(INSTALLED, child, Size(3 * eight.parameters // 2, eight.flops))
    assert same.name == "diffusers at 0.67x our parameters, 1.00x our FLOPs"


def test_ours_is_as_large_as_the_plain_one_and_trains_on_as_many_images_as_it_says() -> None:
    size, ways = our_ways(TINY)
    plain = PlainUNet(16, 5, 3, **song_config(16, TINY.width, TINY.blocks)["network_options"])
    assert size.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert ways["p = 1"]() == peers.STEPS * TINY.batch
    assert ways["p = 0.5"]() == TINY.batch * (5 + 3 * 2 + 2 * 4)  # Eq. 5: 5 full steps, 3 of half and 2 of quarter size


@pytest.mark.slow
def test_packages_that_cannot_be_had_or_fail_are_skipped_with_a_word_and_the_others_are_measured(
    no_index: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "PACKAGES", (UNFINDABLE, BROKEN, INSTALLED))
    found = peers.beside_peers(TINY, lambda _: None)
    said = capsys.readouterr().out
    assert "another package skipped: ERROR: No matching distribution found for no-such-package-of-patchloom" in said
    assert "a broken one skipped: KeyError: 'nobody'" in said
    assert [finding.what.split(" at ")[0] for finding in found] == [
        "ours, p = 1", "ours, p = 0.5", "diffusers", "  p = 1 over diffusers", "  p = 0.5 over diffusers",
    ]  # fmt: skip
    assert [entry.name for entry in (tmp_path / "peers").iterdir()] == [".lock"]  # nothing half-made is left


@pytest.mark.slow
def test_a_package_goes_without_what_it_can_do_without(no_index: None, capsys: pytest.CaptureFixture[str]) -> None:
    package = Package("diffusers", "diffusers", "UNet2DModel", ("no-such-package-of-patchloom",),
                      "import no_such_package", "import json")  # fmt: skip
    assert peers.python_for(package, False) == sys.executable
    assert "diffusers goes without" in capsys.readouterr().out


@pytest.mark.slow
def test_an_environment_shares_this_torch_is_kept_and_is_made_anew_once_it_fails(
    no_index: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = "import sys, numpy; assert 'peers' in sys.prefix"
    package = Package("some", "some package", "Unet", (), own, own)
    python = peers.python_for(package, False)
    assert Path(python).is_relative_to(tmp_path) and peers.failure(python, own) is None
    assert capsys.readouterr().out.count("making an environment") == 1
    assert peers.python_for(package, False) == python
    assert "making" not in capsys.readouterr().out
    Path(python).unlink()
    assert peers.python_for(package, False) == python
    assert capsys.readouterr().out.count("making an environment") == 1


@pytest.mark.slow
def test_a_torch_is_not_added_where_no_numbers_are_wanted(no_index: None, tmp_path: Path) -> None:
    unfit = Package("unfit", "unfit", "Unet", (), "raise RuntimeError('does not fit')", "import no_such_package")
    assert not peers.is_in_earnest(TINY) and peers.is_in_earnest(Scale())
    with pytest.raises(NotHere, match="does not fit; a torch of its own is installed only where"):
        peers.python_for(unfit, peers.is_in_earnest(TINY))
    assert [entry.name for entry in (tmp_path / "peers").iterdir()] == [".lock"]


def test_a_child_that_ends_says_its_last_words() -> None:
    with Child(sys.executable, "diffusers", setting_of(TINY)) as child, pytest.raises(NotHere, match="divisible"):
        child.size(12)
