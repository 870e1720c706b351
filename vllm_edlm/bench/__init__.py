"""Measurements of serving speed against AR serving and a plain reference loop: `edlm bench`."""
