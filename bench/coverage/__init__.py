"""Which of timm's and torchvision's networks expand exactly, train, and come back unchanged."""
