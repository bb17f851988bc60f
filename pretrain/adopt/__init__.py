"""Models of `transformers` that a recipe may begin with."""
