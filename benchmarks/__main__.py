"""All benchmarks that need no GPU, one after another, then docs/benchmarks.md: `python -m benchmarks [NAME ...]`.

Each is a command of its own, of six minutes at most on two cores, and prints its table, its seed and its verdict. One
that was interrupted may be run again by its name; what others found stays.
"""

import argparse
import subprocess
import sys

from benchmarks import docs

COMMANDS = {
    "saturated": ["benchmarks.saturated"],
    "identical": ["benchmarks.against_litserve", "identical"],
    "mixed": ["benchmarks.against_litserve", "mixed"],
    "alone": ["benchmarks.engine_alone", "--model", "models/emoji"],
    "short_jobs": ["benchmarks.short_jobs"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMMANDS))
    names = parser.parse_args().names or list(COMMANDS)
    failed = []
    for name in names:
        if name not in COMMANDS:
            parser.error(f"there is no {name!r}; there are {', '.join(COMMANDS)}")
        if subprocess.run([sys.executable, "-W", "ignore", "-m", *COMMANDS[name]], check=False).returncode:
            failed.append(name)
    docs.fill()
    if failed:
        sys.exit(f"these did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
