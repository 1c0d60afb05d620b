"""The special tokens of DeepSeek-V4, and the files that hold a tokenizer."""

TOKENIZER = "tokenizer.json"


GENERATION = "generation_config.json"


USER, ASSISTANT, THOUGHT = "<｜User｜>", "<｜Assistant｜>", "</think>"


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
