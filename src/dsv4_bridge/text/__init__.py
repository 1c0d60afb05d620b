"""Tokenizers, opened strictly, and how tokens are chosen."""
