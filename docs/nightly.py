"""A nightly pipeline: measure the newest version of a model as the champion is measured, and promote it or fail.

    python docs/nightly.py my-model --reference s3://bucket/pixels --out /scratch/nightly

For cron, Airflow or `ray job submit`: exit code 0 where the newest version is the champion now (or was already), 2 with
one line where it is not better or something is wrong with what was asked. A second call does only what is missing.
"""

import argparse
import sys

from patchloom.errors import UserError
from patchloom.models.checkpoints import CheckpointError
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.registry.promoting import promote_model
from patchloom.pipelines.sample import sample
from patchloom.platform.tracking.registry import list_versions


def nightly(name: str, reference: str, out: str, seeds: str, steps: int, features: str, metric: str) -> str:
    """Sample and measure the champion and the newest version with the same seeds; promote the better one."""
    rows = list_versions(name)
    if not rows:
        raise UserError(f"no version of {name} is registered: train and register one first")
    newest = rows[0]["version"]
    champion = next((row["version"] for row in rows if "champion" in row["aliases"]), None)
    for version in {newest, champion} - {None}:
        folder = f"{out}/{name}-{version}"
        sample(f"models:/{name}/{version}", folder, seeds, steps=steps)
        evaluate(folder, reference, features=features)
    return promote_model(name, newest, if_better=metric)


def main() -> int:
    """Parse the command line, run the pipeline, and say what came of it in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0-999")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--features", default="inception")
    parser.add_argument("--metric", default="fid")
    try:
        print(nightly(**vars(parser.parse_args())))
    except (UserError, CheckpointError) as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
