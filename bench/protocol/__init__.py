"""How kernels are measured: shapes, contenders, correctness before speed, timing, limits of the machine, and the table."""
