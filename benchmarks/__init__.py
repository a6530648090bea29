"""What the README's figures come from: each program prints a table and writes JSON."""
