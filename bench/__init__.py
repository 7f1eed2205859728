"""The benchmark suite: kernels and engine against their peers and the roofline. Not written yet."""
