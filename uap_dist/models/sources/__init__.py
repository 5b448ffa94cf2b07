"""Where networks come from: torchvision, timm, a user's own code."""
