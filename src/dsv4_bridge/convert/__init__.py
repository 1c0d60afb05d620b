"""One checkpoint into another, byte for byte, resumable; and the proof that two are the same."""
