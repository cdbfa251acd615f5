"""What is fast, measured against a baseline in the same run. Each module prints a table and writes it to results/."""
