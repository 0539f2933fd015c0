"""Runs the command."""

import sys

from loadtest.gpu_day.command import main

if __name__ == "__main__":
    sys.exit(main())
