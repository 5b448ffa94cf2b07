"""What users take away: perturbations and pools as files, and the transform for training."""
