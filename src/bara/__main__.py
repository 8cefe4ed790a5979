"""`python -m bara`."""

import sys

from bara.cli import main

sys.exit(main())
