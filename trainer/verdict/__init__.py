"""Finished runs -> does a ~ c > b hold here? No torch: it starts in well under a second."""
