"""`python -m lowformer` is the command `lowformer`."""

import sys

from lowformer.cli import main

sys.exit(main())
