"""FLOPs: those that torch's own counter sees, without the seconds that it takes to load."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import training_flops

SONG: dict[str, Any] = {"width": 16, "width_multipliers": [1, 2, 2], "blocks": 2, "attention": [16, 8], "dropout": 0.1}
NCSNPP = {"embedding": "fourier", "residual_input": True, "filter_taps": [1, 3, 3, 1], "noise_width_multiplier": 2}
BASE = DenoiserConfig(network="song", network_options=SONG, resolution=32, channels=3, classes=0,
                      coordinates="linear", sigma_data=0.5)  # fmt: skip
CONFIGS = {
    "ddpmpp": BASE,
    "ddpmpp with all conditions": replace(
        BASE, classes=5, patch_size=True, coordinates="implicit",
        network_options=SONG | {"augmentation": 9, "stem": [16, 16, 16]},
    ),
    "ncsnpp": replace(BASE, classes=5, network_options=SONG | NCSNPP),
    "adm": replace(BASE, network="dhariwal", classes=3, patch_size=True, network_options=SONG | {"head_width": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_flops_are_those_of_torchs_counter(name: str, size: int) -> None:
    config = CONFIGS[name]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_denoiser(config).eval()(torch.zeros(1, 3, size, size), torch.ones(1))
    assert training_flops(config, size) == 3 * counter.get_total_flops()


def test_a_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        training_flops(CONFIGS["adm"], 10)


def test_counting_does_not_load_torchs_compiler() -> None:
    code = (
        "import sys; from patchloom.models.cards import DenoiserConfig; "
        f"from patchloom.models.flops import training_flops; training_flops({CONFIGS['adm']}, 32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch._dynamo' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
