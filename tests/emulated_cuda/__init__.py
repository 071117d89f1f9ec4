"""CUDA devices on a machine without one: kernels compiled for its processor, behind a driver of ours."""
