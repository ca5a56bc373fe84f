"""Reads sources of rows into problems and demonstrations, and reports rows that cannot be used."""
