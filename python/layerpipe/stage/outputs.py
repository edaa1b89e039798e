"""What a stage hands on to the next one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def handed_on(output: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor], module: nn.Module) -> Tensor:
    """An output cut off from the graph; a copy of what is a weight or a buffer, which the stage will change.

    Args:
        output: of the layers in ``module``, whose weights with a gradient are ``params``.
        inputs: of the same forward.
    """
    made = output if output._base is None else output._base
    if made.is_leaf and not any(made is x for x in inputs):  # not computed by the layers
        memory = output.untyped_storage()
        if memory.data_ptr() in {t.untyped_storage().data_ptr() for t in (*params, *module.buffers())}:
            if output.is_conj() or output.is_neg():
                return output.detach().clone()
            # Of the memory as it lies: an expanded buffer stays as small as it is.
            copy = torch.empty(0, dtype=output.dtype, device=output.device)
            return copy.set_(memory.clone(), output.storage_offset(), output.shape, output.stride())
    return output.detach()
