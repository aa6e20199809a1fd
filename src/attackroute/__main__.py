"""``python -m attackroute`` is the ``attackroute`` command."""

from attackroute.cli.app import main

if __name__ == "__main__":
    main()
