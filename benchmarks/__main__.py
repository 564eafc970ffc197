"""`python -m patchloom.benchmarks`, and so `patchloom benchmark`, which starts it in a process of its own."""

import argparse
import contextlib
import json
import signal
import sys

from patchloom.benchmarks.suite import SUBJECTS, benchmark
from patchloom.errors import UserError


def main() -> int:
    """Parse, measure, print; exit code 2 for a mistake."""
    parser = argparse.ArgumentParser("patchloom benchmark", description="Measure the platform.")
    parser.add_argument("subjects", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for name, subject in SUBJECTS.items():
            print(f"{name:<16} {subject.minutes:>4.1f} min  {subject.words}")
        return 0
    for end in (signal.SIGTERM, signal.SIGHUP):  # what was started ends with this
        signal.signal(end, lambda number, _: sys.exit(128 + number))
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            record = benchmark(
                options.subjects, out=options.out, rounds=options.rounds, tiny=options.tiny, force=options.force
            )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        print(f"patchloom: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
