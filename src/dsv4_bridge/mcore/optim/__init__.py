"""Optimizers and their state: Muon, whole tensors, what a step gathers."""
