"""Computations in torch alone, each with its own backward; here a fused kernel takes a place."""
