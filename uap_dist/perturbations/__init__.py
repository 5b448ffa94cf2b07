"""Perturbations and pools as files, their names in tables, and the transform that adds them to training images."""
