"""How much patches save: counted images a second and updates a second against p = 1, draw by draw, two workers.

All settings run in one session of two gloo workers, interleaved in rounds, on noise in place of images. The steps of a
setting are the first of its run that together have Eq. 5's shares exactly, so that luck is not measured. What the cost
model foretells from the seconds of single sizes stands beside what was measured.

    python benchmarks/patch_gain.py [--rounds 10] [--width 16] [--out benchmarks/results]
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from patchloom.models.codec import pixel_space
from patchloom.models.cost import foretold_gain, measured_seconds_of_crop
from patchloom.models.denoiser import build_denoiser
from patchloom.models.patches import patch_schedule
from patchloom.models.plan import Method, StepPlan, plan_step
from patchloom.models.step import Rows, new_state, training_step

SIDE, WORKERS, STEPS = 64, 2, 100
P = 0.5


def settings() -> dict[str, Method]:
    base = Method(
        seed=0, schedule=patch_schedule(SIDE, P), updates=10**6, batch_size=16, block_size=2, lr=1e-4,
        lr_rampup_images=0,
    )  # fmt: skip
    return {
        "p = 1": replace(base, schedule=patch_schedule(SIDE, 1.0)),
        "shared": base,
        "stratified": replace(base, draw="stratified"),
        "independent": replace(base, draw="independent", emulated_ranks=WORKERS),
    }


def representative_steps(method: Method) -> list[StepPlan]:
    """The first STEPS steps of the run whose sizes have exactly their shares."""
    if method.draw == "stratified":
        return [plan_step(method, step, 0) for step in range(STEPS)]
    ranks = method.emulated_ranks
    shares = {size.pixels: size.probability for size in method.schedule.sizes}
    room: Counter[tuple[int, ...]] = Counter()
    combinations: list[tuple[int, ...]] = [()]
    for _ in range(ranks):
        combinations = [(*some, pixels) for some in combinations for pixels in shares]
    for some in combinations:
        share = 1.0
        for pixels in some:
            share *= shares[pixels]
        room[some] = round(STEPS * share)
    chosen, step = [], 0
    while sum(room.values()) > 0:
        plan = plan_step(method, step, 0)
        sizes = tuple(size.pixels for size in plan.sizes)
        if room[sizes] > 0:
            room[sizes] -= 1
            chosen.append(plan)
        step += 1
    return chosen


def worker(rank: int, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORKERS)
    torch.manual_seed(0)
    denoiser = build_denoiser({
        "network": "song", "resolution": SIDE, "channels": 3, "classes": 0, "coordinates": "linear", "sigma_data": 0.5,
        "network_options": {"width": options.width, "width_multipliers": [1, 2, 2], "blocks": 1, "attention": [16],
                            "dropout": 0.0},
    }).train()  # fmt: skip
    methods, space = settings(), pixel_space()
    states = {name: new_state(denoiser, [], method, (0.9, 0.999), 1e-8) for name, method in methods.items()}
    plans = {name: representative_steps(method) for name, method in methods.items()}
    seconds, crops, steps = Counter[str](), Counter[str](), Counter[str]()
    costs = []
    for number in range(-1, options.rounds):  # the first round warms up
        costs.append(measured_seconds_of_crop(denoiser, methods["shared"], space, WORKERS, repeats=1))
        for name, method in methods.items():
            mine = [
                (plan, [(group, rows_for(len(group.crops))) for group in plan.share(rank, WORKERS)])
                for plan in plans[name][max(number, 0) :: options.rounds]
            ]
            torch.distributed.barrier()
            began = time.perf_counter()
            for plan, work in mine:
                training_step(states[name], method, plan, work, space, torch.distributed.all_reduce)
            torch.distributed.barrier()
            if number >= 0:
                seconds[name] += time.perf_counter() - began
                crops[name] += sum(plan.crops for plan, _ in mine)
                steps[name] += len(mine)
    if rank == 0:
        middle = sorted(range(1, len(costs)), key=lambda n: costs[n][SIDE])[(len(costs) - 1) // 2]
        results.update({
            "images_per_second": {name: crops[name] / seconds[name] for name in methods},
            "updates_per_second": {name: steps[name] / seconds[name] for name in methods},
            "seconds_of_crop": costs[middle],
        })  # fmt: skip
    torch.distributed.destroy_process_group()


def rows_for(count: int) -> Rows:
    return Rows(torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8), torch.full((count,), -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(worker, (options, results), nprocs=WORKERS)
    found = dict(results)
    methods, images, updates = settings(), found["images_per_second"], found["updates_per_second"]
    foretold = {
        name: foretold_gain(methods[name], found["seconds_of_crop"], WORKERS) for name in methods if name != "p = 1"
    }
    print(f"{'draw':<12}  {'images/s':>9}  {'gain':>6}  {'foretold':>8}  {'gain an update':>14}  {'foretold':>8}")
    print(f"{'p = 1':<12}  {images['p = 1']:>9.1f}")
    gains = {}
    for name, gain in foretold.items():
        gains[name] = {
            "per_image": images[name] / images["p = 1"], "per_update": updates[name] / updates["p = 1"],
            "foretold_per_image": gain.per_image, "foretold_per_update": gain.per_update,
        }  # fmt: skip
        print(f"{name:<12}  {images[name]:>9.1f}  " + f"{gains[name]['per_image']:>5.2f}x  {gain.per_image:>7.2f}x  "
              + f"{gains[name]['per_update']:>13.2f}x  {gain.per_update:>7.2f}x")  # fmt: skip
    print(f"shared over independent: {images['shared'] / images['independent']:.2f}x")
    record = {
        "benchmark": "patch_gain", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": platform.processor(),
        "cpus": os.cpu_count(), "torch": torch.__version__, "workers": WORKERS, "p": P, "resolution": SIDE,
        "width": options.width, "gains": gains, **found,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"patch_gain-{record['date']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
