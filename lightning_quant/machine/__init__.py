"""What this machine is, and how long a call takes on it."""
