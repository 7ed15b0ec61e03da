"""Paired seeds: many runs of one question, carried out, compared and written up."""
