"""Conversion between checkpoints of training runs and Hugging Face folders, and comparison of any two. Imports no torch."""
