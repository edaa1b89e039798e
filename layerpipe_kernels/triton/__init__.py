"""The fused step in Triton, for machines without nvcc; on the CPU only under ``TRITON_INTERPRET=1``.

The files: :mod:`.number` random bits and rounding, :mod:`.access` memory in 16-byte pieces, :mod:`.rule` the formulas,
:mod:`.step` the walk over a group's tensors, :mod:`.runner` its tables and launch, :mod:`.tensor` ops on one tensor.
"""

from layerpipe_kernels.triton.runner import TritonRunner
from layerpipe_kernels.triton.tensor import ema_update_, reconstruct

__all__ = ["TritonRunner", "ema_update_", "reconstruct"]
