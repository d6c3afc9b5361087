"""Settings: one frozen dataclass per group, checked on construction; composed with Hydra."""
