"""Finished runs -> does a ~ c > b hold here, and what do weight tickets show? No torch: it starts in well under a second."""
