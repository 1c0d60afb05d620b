"""Megatron's torch_dist folders, read and written without torch, nothing of them executed."""
