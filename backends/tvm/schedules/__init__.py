"""What is done to a definition for each architecture: tiles, instructions, where a patch is gathered."""
