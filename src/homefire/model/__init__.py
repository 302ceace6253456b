"""Loading and running network definitions: shared by the trainer's and the sampler's engine (torch)."""
