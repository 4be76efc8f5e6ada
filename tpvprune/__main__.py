"""`python -m tpvprune` is the same program as `tpvprune`."""

from tpvprune.cli import main

if __name__ == "__main__":
    main()
