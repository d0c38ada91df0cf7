"""Score extracted networks on the digits with plain PyTorch and timm; gpd is not imported.

python demo/evaluate.py student.safetensors teacher.pt2
"""

import json
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of validation and test digits, prepared as in configs/digits.yaml."""
    data = load_digits()
    labels = torch.tensor(data.target)
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    images = (images - 0.5) / 0.5
    rest, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=data.target, random_state=0
    )
    _, validation = train_test_split(
        rest, test_size=0.25, stratify=data.target[rest], random_state=0
    )
    return {
        "validation": (images[validation], labels[validation]),
        "test": (images[test], labels[test]),
    }


def load(path: Path) -> torch.nn.Module:
    """Load a state dict into the timm model in its metadata, or a .pt2 file as a program."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    with safe_open(path, framework="pt") as file:
        spec = json.loads(file.metadata()["model"])
    model = timm.create_model(spec["name"], num_classes=spec["num_classes"], **spec["model_args"])
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def main() -> None:
    """Print a JSON line per file: per split the accuracy in percent, and which images are wrong."""
    splits = digits()
    for name in sys.argv[1:]:
        model = load(Path(name))
        accuracy, wrong = {}, {}
        for split, (images, labels) in splits.items():
            with torch.no_grad():
                hits = model(images).argmax(dim=1) == labels
            accuracy[split] = 100 * hits.float().mean().item()
            wrong[split] = (~hits).nonzero().flatten().tolist()
        print(json.dumps({"file": name, **accuracy, "wrong": wrong}))
    assert "gpd_cli" not in sys.modules


if __name__ == "__main__":
    main()
