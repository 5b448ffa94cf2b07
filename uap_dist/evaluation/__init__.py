"""Evaluation of any perturbations on any networks and images."""
