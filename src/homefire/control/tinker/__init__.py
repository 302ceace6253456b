"""The root Tinker plane: sessions, training runs and samplers, over ordinary jobs and deployments.

See docs/decisions/2026-11-24-root-plane.md.
"""
