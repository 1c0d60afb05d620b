"""Conversations into packs of learned tokens."""
