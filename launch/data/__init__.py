"""Training data: tokenizer, token streams on disk, blending, batches, and the bigram baseline.

`loader.open_data` is the way in. Only `loader` needs torch.
"""
