"""How it comes back: closed form first, then distillation; labels optional."""
