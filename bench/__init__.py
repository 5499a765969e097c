"""Timings of the ops and of the whole cache step; ``make bench`` runs them."""
