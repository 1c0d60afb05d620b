"""What a run needs, before it starts: tensors, memory of every rank, FLOPs."""
