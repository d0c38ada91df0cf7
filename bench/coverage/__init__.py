"""Test of which networks of timm and torchvision expand exactly, train, and extract exactly."""
