"""The step's backends on the CPU, for tests of each."""

from __future__ import annotations

import pytest

from layerpipe_kernels import available_backends

needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="built without a compiler")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
