"""The parts of the model, under the names of Megatron-LM's dev branch."""
