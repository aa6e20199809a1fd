"""``attackroute`` and ``python -m attackroute``."""

import os
import signal
import sys

if sys.path[0] == os.getcwd():  # put there by -m; what lies in the current folder must not be taken for a library
    del sys.path[0]


def main() -> None:
    """Run the command line; Ctrl-C ends it without a word while it is loaded, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from attackroute.cli.app import run

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
