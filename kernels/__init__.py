"""Tensors in, tensors out: one folder per operation. Knows no config, no module and no rank.

Defines no version: libraries that look for the Hugging Face package of the same name would take this folder for it.
"""
