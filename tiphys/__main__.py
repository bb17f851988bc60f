"""`python -m tiphys` is the command `tiphys`."""

import sys

from tiphys.dataio.python_path import leave_current_folder

leave_current_folder()  # before anything else is imported

from tiphys.launch.cli import main

sys.exit(main())
