"""The benchmark suite: kernels and engine against their peers and the roofline, measured in one run. See README.md beside this file."""
