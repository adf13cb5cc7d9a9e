"""What `bench.upcycle_quality` measures: models made of parts, arms of training, gaps of settings that are not exact."""
