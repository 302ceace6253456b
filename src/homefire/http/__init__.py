"""What every HTTP service shares: authentication, caps, request ids, error bodies, serving."""
