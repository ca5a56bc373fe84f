"""`python -m rlcs` is the command `rlcs`, as `torchrun -m rlcs` needs it."""

from rlcs.cli.main import main

if __name__ == "__main__":
    main()
