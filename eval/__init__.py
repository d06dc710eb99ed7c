"""Benchmark evaluation, installed as visualrwkv.eval: predictions, scores, upload files, reports.

`benchmark(name, data)` gives one benchmark over the files in a folder. Only `run` touches a model; everything else
works without torch.
"""

from importlib import import_module

from visualrwkv.errors import InputError

BENCHMARKS = {  # name -> class, in the module of that name
    "vqav2": "VQAv2",
    "scienceqa": "ScienceQA",
    "textvqa": "TextVQA",
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMBench",
    "mmbench_cn": "MMBenchCN",
    "mmvet": "MMVet",
    "seedbench": "SEEDBench",
}


def benchmark(name, data, **options):
    """A benchmark by its name; see `common.Benchmark` for the arguments."""
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
    return getattr(import_module(f"{__name__}.{name}"), BENCHMARKS[name])(data, **options)
