"""What `bench.a2a_lab` is made of: case and variants, the steps on every rank, DeepSpeed's layer, and the torchrun job."""
