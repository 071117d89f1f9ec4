"""The ordered graph passes, one file each, and what they ask of a graph."""
