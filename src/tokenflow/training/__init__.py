"""Training: losses, the loop and checkpoints. Import the modules by name; importing this room loads nothing."""
