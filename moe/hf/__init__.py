"""Checkpoints in the formats of Hugging Face: files, families and the parts that all of them are made of. Imports no torch."""
