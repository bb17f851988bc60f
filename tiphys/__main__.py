"""`python -m tiphys` is the command `tiphys`."""

import sys

from tiphys.launch.cli import main

sys.exit(main())
