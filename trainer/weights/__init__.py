"""Weight tickets: which weights of a model are trained at all, mined once and kept as files."""
