"""Every public function of the method says what shapes it takes, what it raises, and which equation it is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "models"
SHAPE = re.compile(
    r"\((?:N|B|C|H|W|K|A|E|n|m|d|\d|steps|sizes|patch sizes|height|\*)[^()]*(?:,|\))|any shape|scalar|float"
)
SOURCE = re.compile(r"EDM2?\b|Patch Diffusion|section \d|Eq\. \d|et al\. \d{4}|Kingma")
# the files that write down a paper; the others only carry it about
OF_A_PAPER = ("augment", "denoiser", "ema", "guidance", "loss", "noise", "patches", "samplers")
# what is ours, or is no equation
OWN = {
    "augment": {"augment"},
    "denoiser": {"build_checked", "build_denoiser", "halvings_of", "skeleton", "text_shape", "to_channels_last"},
    "ema": {"update", "decay", "combine", "power_of_width"},
    "guidance": {"guides_at"},
    "loss": {"losses_by_sigma", "held_out_loss"},
    "noise": {"linear_sigmas"},
    "patches": {"extended_grid", "offsets", "mean_multiplier", "updates"},
    "samplers": set(),
}


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Public functions and methods with their docstrings; those of private classes and functions left out."""
    module = ast.parse(path.read_text())
    for node in module.body:
        inside = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for function in inside:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                yield function, ast.get_docstring(function) or ""


def own_raises(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(function))


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.stem)
def test_public_docstrings_have_shapes_errors_and_source(path: Path) -> None:
    silent = []
    for function, words in functions(path):
        arguments = function.args.args + function.args.kwonlyargs
        annotations = [ast.unparse(part) for part in (*(a.annotation for a in arguments), function.returns) if part]
        if not words:
            silent.append(f"{function.name}: no docstring")
        takes_tensors = any("Tensor" in text and not re.search("Callable|dict", text) for text in annotations)
        if takes_tensors and not SHAPE.search(words):
            silent.append(f"{function.name}: no shape")
        if own_raises(function) and "raise" not in words.lower():
            silent.append(f"{function.name}: raises without a word")
        is_method = path.stem in OF_A_PAPER and function.name not in OWN[path.stem]
        if is_method and not SOURCE.search(words) and function.name not in ("forward",):
            silent.append(f"{function.name}: no source")
    assert not silent, "\n".join(silent)
