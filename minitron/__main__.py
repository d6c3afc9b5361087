"""`python -m minitron VERB ...`."""

from minitron.cli import main

if __name__ == "__main__":  # checkpoint writers spawn processes that import this file
    raise SystemExit(main())
