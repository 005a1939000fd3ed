"""These tests run kernels in Triton's interpreter, which must be switched on before any kernel is defined: in a process of their
own, started by ``tests/triton/test_interpreter.py`` or by hand with ``TRITON_INTERPRET=1 pytest tests/triton/interpreted``.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
