"""`python -m alignx_ds`, which launchers start."""

from alignx_ds.cli import run

if __name__ == "__main__":
    run()
