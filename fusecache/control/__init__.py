"""Which mounts this machine has, and the control socket of each, both ends."""
