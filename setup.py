from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The one version string, read from the package without importing it (importing needs torch)."""
    for line in (ROOT / "stable_cascade" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__ = "):
            return line.split('"')[1]
    raise ValueError("stable_cascade/__init__.py has no line '__version__ = \"...\"'")


# Lowest versions: what `make test-floors` installs and tries. constraints.txt: what was tested together.
REQUIRES = [
    "torch>=2.8",
    "accelerate>=1.10",
    "diffusers>=0.38",
    "transformers>=5.4",
    "peft>=0.21",
    "huggingface_hub>=1.23",
    "safetensors>=0.8",
    "webdataset>=0.2.100",
    "datasets>=4.0",
    "wandb>=0.18",
    "omegaconf>=2.4",
    "PyYAML>=6.0",
    "fsspec>=2024.6",
    "aiohttp>=3.10",  # fsspec reads https shards with it
    "braceexpand>=0.1.7",
    "jinja2>=3.1",  # huggingface_hub fills the template of model cards with it
    "tqdm>=4.67",
    "psutil>=5.9",
    "pillow>=10.3",
    "numpy>=2.0",
    "matplotlib>=3.8",
]

EXTRAS = {
    "s3": ["s3fs>=2024.6"],
    "controls": ["opencv-contrib-python-headless>=4.9", "scikit-image>=0.22"],
    "identity": ["insightface>=0.7", "onnxruntime>=1.17"],
    "controlnet_aux": ["controlnet-aux>=0.0.9"],  # its own requirements bring torchvision
    "quant": ["bitsandbytes>=0.46"],
    "float8": ["torchao>=0.14"],
    "app": ["gradio>=6.31,<7"],
    "docs": ["mkdocs-material>=9.5"],
    "tensorboard": ["tensorboard>=2.16"],
    "embedded": ["resvg-py>=0.5"],
    "quality": ["ruff>=0.14", "mypy>=1.15", "types-PyYAML>=6.0"],
    "test": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",  # a test that hangs fails by its name
        "pytest-xdist>=3.6",
        "s3fs>=2024.6",
        "moto[server]>=5.0",
        "tensorboard>=2.16",
        "opencv-contrib-python-headless>=4.9",
        "scikit-image>=0.22",
        "gradio>=6.31,<7",
        "playwright>=1.49",  # drives Debian's chromium; it downloads no browser by itself
    ],
}


class BuildWithLaunchConfigs(build_py):
    """Puts accelerate_configs/ into the built package, where `stable-cascade train --launch NAME` finds it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree("accelerate_configs", str(Path(self.build_lib) / "stable_cascade" / "accelerate_configs"))


setup(
    name="stable-cascade",
    version=version(),
    description="Train and run Stable Cascade: every training, every pipeline, every file format.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["stable_cascade", "stable_cascade.*"]),
    package_data={"stable_cascade": ["embedded/**/*", "py.typed"]},
    cmdclass={"build_py": BuildWithLaunchConfigs},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["stable-cascade = stable_cascade.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
