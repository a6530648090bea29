"""The `persimmon` commands: what each does, and its flags.  A command's file is imported when that command runs."""
