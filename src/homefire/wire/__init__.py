"""What crosses a process boundary. Imports nothing of ours; every other package may import it."""
