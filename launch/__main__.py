"""`python -m launch` is the command `tiphys`."""

import sys

from launch.cli import main

sys.exit(main())
