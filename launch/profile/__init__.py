"""Where the time of a job goes: links, layers and recorded runs. Importing this package imports no torch."""
