"""Measuring: a model and data go in, frozen numbers come out. Nothing here changes a model."""
