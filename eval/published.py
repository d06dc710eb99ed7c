"""Published numbers, to stand beside measured ones.

VisualRWKV: P arXiv 2406.13362 (COLING 2025), H arXiv 2410.11665, R the project's README (v7), E arXiv 2404.05892.
Others: L LLaVA model zoo, T TinyLLaVA cards, I Imp-v1.5 card, B Bunny cards, P and H as those papers quote them.
"""

SPLITS = {  # what the published numbers are measured on
    "vqav2": "test-dev, by the server",
    "gqa": "testdev",
    "scienceqa": "test, problems with a picture",
    "textvqa": "val, with OCR words in the prompt",
    "pope": "mean F1 over 2,910 + 3,000 + 3,000 questions",
    "mme": "perception",
    "mmbench": "dev, by the server",
    "mmbench_cn": "dev, by the server",
    "vizwiz": "test, by the server",
    "mmvet": "graded by GPT-4; values of source P stand in its MMBench-CN column by mistake",
    "seedbench": "all",
}
_COLUMNS = "vqav2 gqa scienceqa textvqa pope mme mmbench mmbench_cn vizwiz mmvet seedbench".split()
_TABLE = """
VisualRWKV-Base, RWKV-5 1.6B | 51.1 48.1 41.9 35.2 73.1 - - - - - - | P
VisualRWKV, RWKV-6 1.6B | 69.42 55.23 59.05 43.57 83.2 1204.90 55.8 53.2 29.84 - - | P
VisualRWKV, RWKV-6 3B | 71.52 59.56 65.34 48.68 83.1 1369.19 59.5 56.3 - - - | P
VisualRWKV, RWKV-6 7B | 75.82 64.27 68.22 51.01 84.7 1387.75 65.8 63.7 - - - | P
VisualRWKV-5, Eagle 1.5B | - 48.5 46.2 37.8 81.8 - - - - - - | E
VisualRWKV-5, Eagle 3B | - 49.7 58.3 46.4 81.4 - - - - - - | E
VisualRWKV v6 1.6B, three encoders | 73.66 58.23 57.02 48.70 - - - - - - - | R
VisualRWKV-HD 1.6B | - 60.84 54.39 54.71 86.0 1378.62 60.31 55.41 54.97 - - | H
VisualRWKV-UHD 1.6B | - 59.52 56.97 56.31 85.3 1321.33 58.42 52.84 49.88 - - | H
VisualRWKV v7.00 0.1B | 75.22 59.92 50.62 37.90 - - - - - - - | R
VisualRWKV v7.00 0.4B | 77.85 62.30 54.98 41.05 - - - - - - - | R
VisualRWKV v7.00 1.5B | 79.84 63.20 59.74 49.49 - - - - - - - | R
LLaVA-1.5 7B | 78.5 62.0 66.8 58.2 85.9 1510.7 64.3 58.3 50.0 31.1 58.6 | L
LLaVA-1.5 13B | 80.0 63.3 71.6 61.3 85.9 1531.3 67.7 63.6 53.6 36.1 61.6 | L
LLaVA-1.5 7B LoRA | 79.1 63.0 68.4 58.2 86.4 1476.9 66.1 58.9 47.8 30.2 60.1 | L
LLaVA-Phi 2.7B | 71.4 - 68.4 48.6 85.0 1335.1 59.8 - - 28.9 - | P
MobileVLM 3B | - 59.0 61.2 47.5 84.9 1288.9 59.6 - - - - | P
MobileVLM 1.7B | - 56.1 54.7 - 84.5 1196.2 53.2 - - - - | H
VL-Mamba 2.8B | 76.6 56.2 65.4 48.9 84.4 1369.6 57.0 - - 32.6 - | P
TinyLLaVA-v1 1.4B | 73.41 57.54 59.40 46.37 - - - - - - - | T
TinyLLaVA 3.1B | 79.9 62.0 69.1 59.1 86.4 1464.9 - - - 32.0 - | T
TinyLLaVA Gemma-SigLIP 2.4B | 78.4 61.6 64.4 53.6 86.4 1339.0 - - - 26.9 - | T
TinyLLaVA Phi-2-SigLIP 3.1B | 80.1 62.1 73.0 60.3 87.2 1466.4 - - - 37.5 - | T
Imp-v1.5 4B | 81.5 63.5 78.0 60.2 86.9 1507.7 73.3 61.1 - 44.6 - | I
Bunny-v1.0 4B | 81.5 63.5 75.1 - 86.7 1495.2 73.5 - - - - | B
BLIP-2, Vicuna-13B | 41.0 41.0 61.0 42.5 85.3 1293.8 - - - 22.4 - | P
InstructBLIP 7B | - 49.2 60.5 50.1 - - 36 - - 26.2 - | P
Qwen-VL-Chat 7B | 78.2 57.5 68.2 61.5 - 1487.5 60.6 - - - - | P
"""


def published(benchmark):
    """[(model, number as printed, source)] of one benchmark."""
    rows = []
    for line in _TABLE.strip().splitlines():
        model, numbers, source = line.split(" | ")
        number = dict(zip(_COLUMNS, numbers.split(), strict=True))[benchmark]
        if number != "-":
            rows.append((model, number, source))
    return rows
