"""The command line `python -m patchloom.benchmarks`, which `patchloom benchmark` starts as a new process."""

import argparse
import contextlib
import signal
import sys

from patchloom.benchmarks.suite import BENCHMARKS, run_benchmarks
from patchloom.errors import UserError


def main() -> int:
    """Parse the options, measure and print. Returns the exit code, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser("patchloom benchmark", description="Measure Patchloom on this machine.")
    parser.add_argument("names", nargs="*", help="benchmarks such as train.sizes, or groups such as train")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument("--out", help="folder for the result file")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, only to check that everything runs")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    options = parser.parse_args()
    if options.list:
        for name, entry in BENCHMARKS.items():
            print(f"{name:<16} {entry.minutes:>4.1f} min  {entry.description}")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave through `finally`, so that child processes end too
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            results = run_benchmarks(
                options.names, out=options.out, rounds=options.rounds, tiny=options.tiny, force=options.force
            )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        print(f"patchloom: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(results.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
