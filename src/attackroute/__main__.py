"""``python -m attackroute`` is the ``attackroute`` command."""

import os
import sys

if sys.path[0] == os.getcwd():  # put there by -m; what lies in the current folder must not be taken for a library
    del sys.path[0]

from attackroute.cli.app import main

if __name__ == "__main__":
    main()
