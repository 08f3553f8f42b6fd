"""Training: losses, the loop and checkpoints. Importing this room loads nothing; import modules by name."""
