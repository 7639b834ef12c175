"""Entry point: `python -m jaxii.main`, or `jaxii` once installed; see `jaxii.cli`."""

import os
import signal
import sys

from jaxii.cli.dispatch import main
from jaxii.console import write_line


def run() -> None:
    """Runs the command line and exits with its code."""
    try:
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        write_line("jaxii: interrupted.", sys.stderr)
        # Shells stop a script whose command has ended by the signal itself.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    run()
