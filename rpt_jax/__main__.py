"""`python -m rpt_jax` is the command `rpt`."""

from rpt_jax.cli import console_main

if __name__ == "__main__":
    console_main()
