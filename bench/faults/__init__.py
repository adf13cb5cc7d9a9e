"""The job of `bench.profile_faults`."""
