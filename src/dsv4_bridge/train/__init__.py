"""Training: recipes, data, chat encoding, LoRA, the loop, FLOPs."""
