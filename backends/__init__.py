"""Backends: a quantized (QDQ) model goes in, the artifact that the target runs comes out."""
