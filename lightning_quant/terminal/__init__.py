"""What is printed: tables and progress."""
