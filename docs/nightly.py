"""A nightly pipeline: evaluate the newest version of a model and the champion, and promote the newest if it is better.

    python docs/nightly.py my-model --reference s3://bucket/pixels --out /scratch/nightly

Run it from cron, Airflow or `ray job submit`. Exit code 0: the newest version is the champion. Exit code 2, with one
line on stderr: it is not better, or an argument is wrong. A second call continues what the first one left.
"""

import argparse
import sys

import patchloom


def nightly(name: str, reference: str, out: str, seeds: str, steps: int, features: str, metric: str) -> str:
    """Sample and evaluate the champion and the newest version with the same seeds; promote the newest if better."""
    versions = patchloom.list_versions(name, limit=1)
    if not versions:
        raise patchloom.UserError(f"{name} has no registered version: train and register a model first")
    newest = versions[0].version
    champion = patchloom.alias_history(name, "champion").current
    for version in {newest, champion} - {None}:
        folder = f"{out}/{name}-{version}"
        patchloom.sample(f"models:/{name}/{version}", folder, seeds, steps=steps)
        patchloom.evaluate(folder, reference, features=features)
    return patchloom.promote_model(name, newest, if_better=metric)


def main() -> int:
    """Parse the command line, run the pipeline and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="registered model")
    parser.add_argument("--reference", required=True, help="prepared dataset to compare with")
    parser.add_argument("--out", required=True, help="folder for the samples")
    parser.add_argument("--seeds", default="0-999", help="seeds to sample (default: 0-999)")
    parser.add_argument("--steps", type=int, default=18, help="sampling steps (default: 18)")
    parser.add_argument("--features", default="inception", help="feature extractor (default: inception)")
    parser.add_argument("--metric", default="fid", help="metric that decides (default: fid)")
    try:
        print(nightly(**vars(parser.parse_args())))
    except patchloom.UserError as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
