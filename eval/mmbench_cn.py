"""MMBench in Chinese."""

from visualrwkv.eval.mmbench import MMBench


class MMBenchCN(MMBench):
    """As MMBench, with the Chinese file and the suffix of the LLaVA pack."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    chinese = True
    suffix = "\n请直接回答选项字母。"
    files = {"dev": "mmbench_dev_cn_20231003.tsv", "test": "mmbench_test_cn_20231003.tsv"}
