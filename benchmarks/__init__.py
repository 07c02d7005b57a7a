"""Measurements of speed, memory and traffic, each of two or more things in one run."""
