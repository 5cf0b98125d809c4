"""What is done to a user's module or process and undone: routing, copies, devices, compilers, settings."""
