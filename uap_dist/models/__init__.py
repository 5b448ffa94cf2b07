"""Classifiers: loaded, checked and made faster."""
