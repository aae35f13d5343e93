"""Measurements, each a ratio between two things in one run. ``make bench`` runs all of them."""
