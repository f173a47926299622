"""Weight tickets: which weights of a model are kept, mined once and trained many times."""
