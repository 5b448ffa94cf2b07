"""Any perturbations on any networks and images."""
