"""Everything with a user, a file or a clock. Importing this package imports no torch."""
