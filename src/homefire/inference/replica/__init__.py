"""The HTTP service around an engine: completions, hot loading, status. No torch."""
