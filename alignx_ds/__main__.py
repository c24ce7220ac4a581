"""`python -m alignx_ds`, and `deepspeed --module alignx_ds`."""

import sys

from alignx_ds.cli import main

sys.exit(main())
