"""The command line: the composition root. Modules here import nothing heavy until a command runs."""
