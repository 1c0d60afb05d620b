"""The device of this process."""

import torch


def device() -> torch.device:
    """Where models are built: this rank's CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
