"""A run and photos -> the class of each photo; `datalth-predict`."""
