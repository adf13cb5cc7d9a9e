"""The mathematics of Mixture-of-Experts on one process. Never imports torch.distributed."""
