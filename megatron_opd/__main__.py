"""`python -m megatron_opd`."""

from megatron_opd.cli import main

if __name__ == "__main__":
    main()
