"""The whole lifecycle as a researcher would write it: what `homefire quickstart` runs.

`lifecycle.py` is the story in seven steps. It talks to homefire through `homefire.sdk` alone, like
any script of a user; beside it stand the task, the objective and the report.
"""
