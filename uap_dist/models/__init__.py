"""Classifiers: loading networks and their weights, checking them, and accelerating them."""
