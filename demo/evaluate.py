"""Score an extracted student with plain PyTorch and timm: nothing of gpd is imported.

python demo/evaluate.py student.safetensors --split validation
"""

import argparse
import json
import sys

import timm
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
