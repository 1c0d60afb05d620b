"""Where tensors come from and go to: safetensors folders, torch_dist folders, output streams."""
