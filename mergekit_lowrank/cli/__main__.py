"""``python -m mergekit_lowrank.cli``."""

from mergekit_lowrank.cli import main

if __name__ == "__main__":
    main()
