"""``python -m lowkernels`` is the command ``lowkernels``."""

import sys

from .cli import main

sys.exit(main())
