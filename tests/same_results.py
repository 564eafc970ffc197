"""Compare two versions bit for bit: `python tests/same_results.py OTHER_CHECKOUT` (about ten minutes on two cores).

Both checkouts run the same commands on this machine: the demo up to its latents, short training runs, an autoencoder,
samples of a registered model, and metrics. A table shows which results have equal bytes; exit code 1 means that some
differ. Run it before and after a change that must not change results.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

HERE = Path(__file__).parent.parent
RECIPE = """
name: tiny
seed: 3
data: {held_out_fraction: 0.2, mirror: %s, augment: %s}
model: {width: 8, width_multipliers: [1, 2], blocks: 1, attention: [8], class_conditional: true,
        label_dropout: 0.1, dropout: 0.1}
patches: {p: 0.5, draw: %s}
optimizer: {lr: 1e-3, lr_rampup_images: 100}
ema: [{halflife_images: 200}, {sigma_rel: 0.1, snapshot_every_images: 400}]
train: {images: 600, batch_size: 16, checkpoint_every_images: 150, log_every_images: 60}
preview: {every_images: 300, count: 4, steps: 2}
"""
RECIPES = {
    "pixels": ("true", "0.1", "shared"),
    "latents": ("false", "0", "shared"),
    "stratified": ("true", "0", "stratified"),
}
COMPARED = (
    "demo/*/dataset.json",
    "demo/*/shards/*.arrow",
    "demo/autoencoder/model/*.safetensors",
    "run*/model/model.safetensors",
    "run*/model/model.json",
    "run*/ema/*/*.safetensors",
    "samples*/*/*.png",
    "samples*/manifest.jsonl",
    "samples/metrics.json",
)


def main(other: Path) -> int:
    """Print the table; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = (results(checkout, Path(folder) / name) for checkout, name in ((HERE, "here"), (other, "other")))
    differing = 0
    for name in sorted(mine.keys() | theirs.keys()):
        is_equal = mine.get(name) == theirs.get(name)
        differing += not is_equal
        if not is_equal or not name.endswith(".png"):
            print(f"{'equal' if is_equal else 'DIFFERS':<8} {mine.get(name, 'missing')[:12]}  {name}")
    print(f"{len(mine) - differing} of {len(mine)} files are equal")
    return 1 if differing or not mine else 0


def results(checkout: Path, folder: Path) -> dict[str, str]:
    """The sha256 of every compared file that a checkout makes in an empty folder, by its name."""
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout.absolute()),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    find = "import patchloom, pathlib; print(pathlib.Path(patchloom.__file__).resolve())"
    found = subprocess.check_output([sys.executable, "-c", find], cwd=folder, env=environment, text=True)
    if not Path(found).is_relative_to(checkout.resolve()):
        raise SystemExit(f"{checkout} has no patchloom: Python imports {found.strip()}")
    for name, values in RECIPES.items():
        (folder / f"{name}.yaml").write_text(RECIPE % values)

    def patchloom(*arguments: str, until: str | None = None) -> None:
        """Run a command; with `until`, stop it once that file exists."""
        print(f"{checkout}: patchloom {' '.join(arguments)}", flush=True)
        command = [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        ) as process:
            while until and process.poll() is None and not (folder / until).exists():
                time.sleep(0.2)
            if until:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode and not until:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")

    patchloom("demo", "--out", "demo", until="demo/latents/dataset.json")
    patchloom("train", "pixels.yaml", "--data", "demo/pixels", "--out", "run", "--workers", "0")
    patchloom("train", "latents.yaml", "--data", "demo/latents", "--out", "run-latents", "--workers", "0")
    patchloom("train", "stratified.yaml", "--data", "demo/pixels", "--out", "run-workers", "--workers", "2")
    patchloom("models", "register", "run", "tiny", "--alias", "champion")
    sample = ("--steps", "5", "--workers", "0", "--seeds", "0-11")
    patchloom("sample", "models:/tiny@champion", "samples", *sample, "--guidance", "1.5")
    patchloom("sample", "models:/tiny@champion", "samples-ancestral", *sample, "--sampler", "ancestral")
    patchloom("sample", "run-latents", "samples-latents", *sample, "--sampler", "dpmpp-2m")
    patchloom("evaluate", "samples", "--reference", "demo/pixels", "--features", "colours")
    files = [path for pattern in COMPARED for path in sorted(folder.glob(pattern))]
    return {str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest() for path in files}


def content(path: Path) -> bytes:
    """The bytes of a file; of averages their tensors, and of metrics their values, without their notes in words."""
    if "ema" in path.parts:
        return b"".join(name.encode() + tensor.tobytes() for name, tensor in sorted(load_file(path).items()))
    if path.name == "metrics.json":
        return json.dumps(json.loads(path.read_bytes()) | {"notes": []}, sort_keys=True).encode()
    return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
