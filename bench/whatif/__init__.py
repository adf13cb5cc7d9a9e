"""The job of `bench.profile_whatif`: its case, and what every rank does."""
