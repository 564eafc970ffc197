"""Launches on one GPU: the kernels of a training step and of sampling, compared with plain loops."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from patchloom.benchmarks.findings import Finding, Scale, exact
from patchloom.benchmarks.gpu_sampling import PLAIN_BATCH, UntrainedModel, generated_batch, plain_batch
from patchloom.benchmarks.gpu_session import GpuSession
from patchloom.benchmarks.gpu_training import FASTEST_EAGER, PLAIN, one_step, plain_steps
from patchloom.benchmarks.launches import count_launches
from patchloom.benchmarks.setups import step_settings
from patchloom.models.cards import DenoiserConfig
from patchloom.models.generate import Sampling

COUNTED_BATCHES = (8, 64)
COUNTED_SAMPLING = Sampling(steps=4, precision=FASTEST_EAGER.precision)


def launches(session: GpuSession, name: str, config: DenoiserConfig, scale: Scale) -> None:
    """Kernels of a training step by batch, and of a network evaluation while sampling, compared with a plain loop."""
    ours, what = FASTEST_EAGER, "kernels" if session.device.type == "cuda" else "operations"
    trainer = ours.trainer(config, step_settings(scale), session.device)
    with tempfile.TemporaryDirectory() as folder:
        models = UntrainedModel.new(config, Path(folder), session.device)
    sampled = replace(models.of(ours), replayed=None)  # one by one, as they are counted
    steps = COUNTED_SAMPLING.steps
    pieces: dict[tuple[str, str], Callable[[], object]] = {}
    for batch in COUNTED_BATCHES:
        pieces[f"step, batch {batch}", PLAIN] = plain_steps(config, batch, session.device, steps=1)
        pieces[f"step, batch {batch}", ours.name] = one_step(trainer, batch)
    evaluation = f"network evaluation while sampling, batch {PLAIN_BATCH}"
    pieces[evaluation, PLAIN] = plain_batch(models.plain, config, session.device, steps)
    pieces[evaluation, ours.name] = partial(generated_batch, sampled, PLAIN_BATCH, COUNTED_SAMPLING)
    counts = count_launches({", ".join(piece): work for piece, work in pieces.items()}, session.device)
    found, ratios = [], []
    for work in dict.fromkeys(work for work, _ in pieces):
        times = COUNTED_SAMPLING.network_evaluations if work == evaluation else 1
        plain, own = (counts[f"{work}, {variant}"] / times for variant in (PLAIN, ours.name))
        found += [Finding(f"{work}, {PLAIN}", exact(plain), what, is_cost=True)]
        found += [Finding(f"{work}, {ours.name}", exact(own), what, is_cost=True)]
        ratios.append(Finding(f"{what} of the plain loop over ours, {work}", exact(plain / own), "x"))
    session.keep(f"{name}: {what}", found + ratios)
