"""What happens around every request: ids, access, limits, admission."""
