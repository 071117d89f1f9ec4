"""The integer program: a quantized model as operations on codes, shared by every backend that generates kernels."""
