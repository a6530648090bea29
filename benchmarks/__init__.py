"""What the figures of docs/ come from: each program prints a table and writes JSON."""
