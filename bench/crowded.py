"""A token's time beside other programs that compute: none, one, and as many as there are cores here, two.

    python -m bench.crowded                    # a minute; prints milliseconds a token

For the embedded model and for one of 147 M parameters with random weights, one sequence in float32: with the threads
that PyTorch has, three times after each other, and with one. `csrc/crowd.h` is what it looks at.
"""

import subprocess
import sys
import time

STEPS = 25


def make_models() -> dict:
    from visualrwkv import load
    from visualrwkv.configuration import VisualRWKVTextConfig
    from visualrwkv.rwkv import RWKV

    large = RWKV(VisualRWKVTextConfig(vocab_size=1000, hidden_size=768, num_hidden_layers=12))
    large.init_weights()
    return {"embedded": (load(device="cpu").model.rwkv, 8), "147 M": (large.eval(), 1)}


def time_tokens(model, calls: int) -> float:
    """Milliseconds of a token, the mean of `calls` times 25."""
    import torch

    from visualrwkv import RWKVState

    with torch.inference_mode():
        embeds = model.emb(torch.ones(1, 1, dtype=torch.long))
        state = RWKVState.zeros(model.config, 1, dtype=embeds.dtype)
        model(embeds, state)
        start = time.perf_counter()
        for _ in range(calls * STEPS):
            model(embeds, state)
        return 1000 * (time.perf_counter() - start) / (calls * STEPS)


def main() -> int:
    import torch

    threads = torch.get_num_threads()
    print(f"{'model':10} {'others':>6} {f'{threads} threads, ms a token':>28} {'one thread':>12}")
    for name, (model, calls) in make_models().items():
        for others in (0, 1, 2):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            try:
                time.sleep(0.5)
                team = [time_tokens(model, calls) for _ in range(3)]
                torch.set_num_threads(1)
                one = time_tokens(model, calls)
            finally:
                torch.set_num_threads(threads)
                for process in busy:
                    process.kill()
                    process.wait()
            print(f"{name:10} {others:6} {' '.join(f'{ms:.2f}' for ms in team):>28} {one:12.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
