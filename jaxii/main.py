"""Entry point: `python -m jaxii.main`, or `jaxii` once installed; see `jaxii.cli`."""

import sys

from jaxii.cli.dispatch import main


def run() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
