"""`python -m dynamicvit`: the command, for launchers that take a module."""

import sys

from dynamicvit_command import main

if __name__ == "__main__":  # not in processes that multiprocessing starts
    sys.exit(main())
