"""Measurements, each a ratio between two things in one run.

``make bench`` runs those of speed; the others (bench/__main__.py has the list) are run by name.
"""
