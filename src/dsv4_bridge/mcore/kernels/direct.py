"""Operations with a backward of their own, where nobody asks for gradients."""

from typing import Any

import torch
from torch import Tensor


class _Forgets:
    """Stands for autograd's context: nothing is kept for a backward that does not come."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def applied(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    """`function.apply(*given)`; without gradients its forward alone.

    Autograd's own part of a call takes as long as several small operations: in decoding, as long as the forward.
    """
    if torch.is_grad_enabled():
        result = function.apply(*given)
    else:
        result = function.forward(_Forgets(), *given)
    assert isinstance(result, Tensor)
    return result
