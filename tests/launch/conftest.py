"""What the tests of the loader share is of use here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "dataio"))
